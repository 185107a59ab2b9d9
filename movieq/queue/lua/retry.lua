#!lua
-- Queues a failed task again: failed -> queued. The attempt number goes on; the budgets of tries are reset.
-- args: task_id nonce limit
--   task_id: of the task
--   nonce: random; a repeated call with the same nonce gets the same answer
--   limit: the number of retries that a task may have
-- Returns {'ok', task_id, created_at_ms, queue_position, estimate_ms, warnings}; {'refused', state} for a task that has not failed;
--   {'spent'} for one that was retried `limit` times; {'unknown'} if the task does not exist.
-- Appends `queued`. The log no longer expires.
-- Cost: O(log n).
-- include: time record run_fields index events lanes queue offers deadlines
local t = load(task_id)
if not t then return {'unknown'} end
local function receipt()
  return {'ok', task_id, tonumber(t.created_at_ms), tonumber(t.retried_position or 1), tonumber(t.estimate_ms), t.warnings}
end
if t.retried == nonce then return receipt() end
if t.status ~= 'failed' then return {'refused', t.status} end
if tonumber(t.retries or 0) >= tonumber(limit) then return {'spent'} end
set(t, {retried = nonce, retries = tonumber(t.retries or 0) + 1, tries = 0, deaths = 0, silences = 0})
show_as_waiting(t)
redis.call('ZREM', K.dead, task_id)
redis.call('ZREM', K.ended, task_id)
unset(t, 'error', 'error_code', 'retryable', 'ended_at_ms', 'start_by_ms')
if t.finish_by_ms and tonumber(t.finish_by_ms) <= now then unset(t, 'finish_by_ms') end
move(t, 'queued')
if not offer(t, 0) then enqueue(t) end
watch_deadline(t)
set(t, {retried_position = 1 + (redis.call('ZRANK', queue(t), task_id) or 0)}) -- queued_position belongs to the receipt of the submit
redis.call('PERSIST', K.log .. task_id)
log(t, 'queued')
return receipt()
