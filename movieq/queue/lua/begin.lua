#!lua flags=allow-oom
-- Begins a try of a delivery: from here on the content of a webhook stays as it is.
-- args: delivery_id
--   delivery_id: TASK-NUMBER
-- Returns the delivery's hash as field, value, ...; {} if there is none (any more); {'wait'} for a webhook while the same task has an earlier
--   one that is pending, since they are sent in order.
-- Cost: O(deliveries of the task).
local key = K.delivery .. delivery_id
local kind, begun = unpack(redis.call('HMGET', key, 'kind', 'begun'))
if kind == 'webhook' and not begun then
  local task_id, number = string.match(delivery_id, '^(.*)%-(%d+)$')
  for n = 1, number - 1 do
    local before = redis.call('HMGET', K.delivery .. task_id .. '-' .. n, 'kind', 'state')
    if before[1] == 'webhook' and before[2] == 'pending' then return {'wait'} end
  end
  redis.call('HSET', key, 'begun', '1')
end
return redis.call('HGETALL', key)
