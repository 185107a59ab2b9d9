#!lua
-- Queues a failed task again: failed -> queued. Its attempts count on, its budget of tries is new.
-- args: task_id nonce
--   nonce: random, of this request; said again with it, the answer is the same
-- Returns {'ok', task_id, created_at_ms, queue_position, estimate_ms, warnings}; {'refused', state}; {'unknown'}.
-- Appends `queued`; the log does not expire any more. Cost: O(log n).
local t = load(task_id)
if not t then return {'unknown'} end
local function receipt()
  return {'ok', task_id, tonumber(t.created_at_ms), tonumber(t.retried_position or 1), tonumber(t.estimate_ms), t.warnings}
end
if t.retried == nonce then return receipt() end
if t.status ~= 'failed' then return {'refused', t.status} end
set(t, {retried = nonce, tries = 0, deaths = 0, silences = 0, progress = 0, current_step = 'waiting_in_queue'})
redis.call('ZREM', K.dead, task_id)
redis.call('ZREM', K.ended, task_id)
unset(t, 'error', 'error_code', 'retryable', 'ended_at_ms', 'stage', 'step', 'steps', 'run', 'start_by_ms')
if t.finish_by_ms and tonumber(t.finish_by_ms) <= now then unset(t, 'finish_by_ms') end
move(t, 'queued')
if not offer(t, 0) then enqueue(t) end
watch_deadline(t)
set(t, {retried_position = 1 + (redis.call('ZRANK', queue(t), task_id) or 0)}) -- beside that of submit, which its receipt keeps
redis.call('PERSIST', K.log .. task_id)
log(t, 'queued')
return receipt()
