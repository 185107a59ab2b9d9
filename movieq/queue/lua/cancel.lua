#!lua flags=allow-oom
-- Cancels a task: queued or processing -> cancelled.
-- args: task_id
--   task_id: of the task
-- Returns {'ok', previous_state, cancelled_at_ms}, the same for a repeated call; {'refused', state} for a completed or failed task;
--   {'unknown'} if the task does not exist.
-- Appends `cancelled`, notifies the worker that runs the task, and adds deliveries to the outbox. The log expires in 24 h.
-- Cost: O(log n).
-- include: time record finish
local t = load(task_id)
if not t then return {'unknown'} end
if t.status == 'cancelled' then return {'ok', t.previous_state or 'queued', tonumber(t.ended_at_ms or now)} end
if t.status ~= 'queued' and t.status ~= 'processing' then return {'refused', t.status} end
set(t, {previous_state = t.status})
finish(t, 'cancelled')
if t.previous_state == 'processing' then redis.call('PUBLISH', K.control .. t.worker_id, 'cancel ' .. task_id .. ' ' .. t.run) end
return {'ok', t.previous_state, now}
