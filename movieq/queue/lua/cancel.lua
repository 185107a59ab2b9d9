#!lua flags=allow-oom
-- Cancels a task: queued or processing -> cancelled.
-- args: task_id
-- Returns {'ok', previous_state, cancelled_at_ms}, the same when said again; {'refused', state} for a completed or failed task; {'unknown'}.
-- Appends `cancelled`; tells the worker that runs it; the log expires in 24 h; fills the outbox. Cost: O(log n).
local t = load(task_id)
if not t then return {'unknown'} end
if t.status == 'cancelled' then return {'ok', t.previous_state, tonumber(t.ended_at_ms)} end
if t.status ~= 'queued' and t.status ~= 'processing' then return {'refused', t.status} end
set(t, {previous_state = t.status})
finish(t, 'cancelled')
if t.previous_state == 'processing' then redis.call('PUBLISH', K.control .. t.worker_id, 'cancel ' .. task_id .. ' ' .. t.run) end
return {'ok', t.previous_state, now}
