#!lua flags=allow-oom
-- Stores the outcome of a try of a delivery: pending -> pending, delivered or failed. Once the delivery has ended, the webhooks that waited
-- for it are due. The id that the CMS assigned is stored in a field of its own, and merged into the task's result when that is read.
-- args: delivery_id state tries status problem media_id
--   delivery_id: TASK-NUMBER
--   state: the new state of the delivery
--   tries: number of tries so far
--   status: HTTP status of the answer; '' for none
--   problem: a sentence; '' for none
--   media_id: JSON of the CMS's id; '' for none
-- Returns the id (JSON) that the task's result has, '' for none. It differs from media_id if another try was faster.
-- Appends `updated` if the id is new: to the project's log, and to the task's log if that has not expired. If a try of the webhook was
--   started without the id, a webhook of type `updated` follows.
-- Cost: O(log n), O(deliveries of the task).
-- include: record events delivery_jobs outbox
local key = K.delivery .. delivery_id
local task_id, before, kind, webhook = unpack(redis.call('HMGET', key, 'task_id', 'state', 'kind', 'webhook'))
local t = task_id and load(task_id)
if not t then return '' end -- the task was swept
local known = t.payload_media_id or t.media_id or '' -- older versions wrote media_id, and the id into the result
if before ~= 'pending' then return known end

redis.call('HSET', key, 'state', state, 'tries', tries, 'last_problem', problem)
if status ~= '' then redis.call('HSET', key, 'last_status', status) end
local new = media_id ~= '' and media_id ~= known and t.status == 'completed' and t.result
if new then
  known = media_id
  set(t, {payload_media_id = media_id})
  local extra = {'"result":' .. t.result, '"payload_media_id":' .. media_id}
  if redis.call('EXISTS', K.log .. task_id) == 1 then
    log(t, 'updated', extra) -- it keeps its time to live
  else
    log_in_project(t, 'updated', event(t, 'updated', extra))
  end
end
if state == 'pending' then return known end

if kind == 'webhook' then
  local number = string.match(delivery_id, '(%d+)$')
  for n = number + 1, tonumber(t.deliveries or 0) do
    if redis.call('HGET', K.delivery .. task_id .. '-' .. n, 'kind') == 'webhook' then make_due(task_id .. '-' .. n) end
  end
elseif webhook and redis.call('HEXISTS', K.delivery .. webhook, 'begun') == 1 then
  if new then deliver(t, 'updated') end
elseif webhook and redis.call('EXISTS', K.delivery .. webhook) == 1 then
  if known ~= '' then redis.call('HSET', K.delivery .. webhook, 'payload_media_id', known) end
  make_due(webhook)
end
return known
