#!lua flags=allow-oom
-- Starts a try of a delivery. From now on the content of a webhook no longer changes.
-- args: delivery_id
--   delivery_id: TASK-NUMBER
-- Returns the delivery's hash as field, value, ...; {} if it does not exist or was swept; {'wait'} for a webhook while an earlier one of
--   the same task is pending, since webhooks are sent in order.
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
