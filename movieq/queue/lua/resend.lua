#!lua
-- Makes a delivery due again: delivered or failed -> pending, with a new budget of tries. A pending delivery is due now. If its host is
-- unresponsive, a probe is due now.
-- args: task_id delivery_id
--   task_id: of the task
--   delivery_id: TASK-NUMBER
-- Returns 'ok'; 'unknown' if the task has no such delivery.
-- Appends nothing. The delivery expires in 30 days.
-- Cost: O(log n).
-- include: time hosts delivery_jobs
local key = K.delivery .. delivery_id
local owner, state, resent, project, url = unpack(redis.call('HMGET', key, 'task_id', 'state', 'resent', 'project_id', 'url'))
if owner ~= task_id then return 'unknown' end
local unresponsive = K.unresponsive .. receiver_of(project, url)
if redis.call('HEXISTS', unresponsive, 'until_ms') == 1 then redis.call('HSET', unresponsive, 'until_ms', now, 'probe_ms', 0) end
if state == 'pending' and make_due(delivery_id) then return 'ok' end
resent = (tonumber(resent or 0) or 0) + 1
local job = delivery_id .. '.' .. resent -- a new name, so that the end of the previous job does not remove it
redis.call('HSET', key, 'state', 'pending', 'tries', 0, 'resent', resent, 'resent_at_ms', now, 'job', job)
redis.call('HDEL', key, 'media_id') -- the CMS is asked again for its document
redis.call('EXPIRE', key, 30 * 86400)
schedule(job, delivery_id, 0)
return 'ok'
