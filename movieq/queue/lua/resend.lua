#!lua
-- Sends a delivery again: delivered or failed -> pending, with a new budget of tries; one that is pending is due now.
-- args: task_id delivery_id
-- Returns 'ok'; 'unknown' where the task has no such delivery.
-- The job has a name of its own, so that the end of the one before does not take it away. Cost: O(log n).
local key = K.delivery .. delivery_id
local owner, state, resent = unpack(redis.call('HMGET', key, 'task_id', 'state', 'resent'))
if owner ~= task_id then return 'unknown' end
if state == 'pending' and hasten(delivery_id) then return 'ok' end
resent = (resent or 0) + 1
redis.call('HSET', key, 'state', 'pending', 'tries', 0, 'resent', resent, 'job', delivery_id .. '.' .. resent)
redis.call('HDEL', key, 'media_id') -- the CMS is asked again
redis.call('EXPIRE', key, 30 * 86400)
post(delivery_id .. '.' .. resent, delivery_id, 0)
return 'ok'
