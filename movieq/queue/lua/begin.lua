#!lua flags=allow-oom
-- Starts a try of a delivery. From now on the content of a webhook no longer changes. No try is started while the host is unresponsive for
-- webhooks of this project. Once that time is over, the next webhook is sent as a probe, and no other until it ends or held_ms have passed.
-- args: delivery_id held_ms
--   delivery_id: TASK-NUMBER
--   held_ms: most time of a probe
-- Returns the delivery's hash as field, value, ...; {} if it does not exist or was swept; {'wait'} for a webhook while an earlier one of
--   the same task is pending, since webhooks are sent in order. If no try was started because of the host, the additional field
--   `held_back_ms` is the time until the next probe, and the delivery is due sooner if the host answers.
-- Cost: O(deliveries of the task).
-- include: time hosts
local key = K.delivery .. delivery_id
local kind, begun, state, project, url = unpack(redis.call('HMGET', key, 'kind', 'begun', 'state', 'project_id', 'url'))
if kind ~= 'webhook' then return redis.call('HGETALL', key) end
if not begun then
  local task_id, number = string.match(delivery_id, '^(.*)%-(%d+)$')
  for n = 1, number - 1 do
    local before = redis.call('HMGET', K.delivery .. task_id .. '-' .. n, 'kind', 'state')
    if before[1] == 'webhook' and before[2] == 'pending' then return {'wait'} end
  end
end

local receiver = receiver_of(project, url)
local until_ms, probe, probe_ms = unpack(redis.call('HMGET', K.unresponsive .. receiver, 'until_ms', 'probe', 'probe_ms'))
if until_ms and state == 'pending' then
  local free_ms = math.max(valid(until_ms, LONGEST_MS), valid(probe_ms, held_ms))
  if free_ms > now and probe ~= delivery_id then
    redis.call('HSET', key, 'last_problem', 'its host does not answer: it is sent when the host answers another webhook, or as the next probe')
    redis.call('SADD', K.held_back .. receiver, delivery_id)
    redis.call('EXPIRE', K.held_back .. receiver, 86400)
    local answer = redis.call('HGETALL', key)
    answer[#answer + 1] = 'held_back_ms'
    answer[#answer + 1] = tostring(free_ms - now)
    return answer
  end
  redis.call('HSET', K.unresponsive .. receiver, 'probe', delivery_id, 'probe_ms', now + held_ms)
end
if not begun then redis.call('HSET', key, 'begun', '1') end
return redis.call('HGETALL', key)
