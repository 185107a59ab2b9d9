#!lua flags=allow-oom
-- Completes a task with the result of its run: processing -> completed.
-- args: task_id run result cms
--   task_id: of the task
--   run: the run token
--   result: JSON of StoredResult, stored unchanged
--   cms: address of the CMS collection that gets the result; '' for none
-- Returns 'ok', also for a repeated call of the same run; 'lost' if the task does not belong to the run.
-- Appends `completed` and adds deliveries to the outbox. The log expires in 24 h. Stores the duration for estimates of this shape (for 30
--   days), and the task as the one that has the result of its fingerprint.
-- Cost: O(log n).
-- include: time record record_bytes counters resume runs finish
local t = load(task_id)
if t and t.status == 'completed' and t.ended_run == run then return 'ok' end
if not holds(t, run, 0) then return 'lost' end
if t.made_ms ~= '0' then -- 0: the run found finished files, so its duration is no basis for estimates
  local ms = worked(t)
  if redis.call('LPUSH', K.durations .. t.shape, ms) > 42 then redis.call('LTRIM', K.durations .. t.shape, 0, 20) end
  redis.call('EXPIRE', K.durations .. t.shape, 30 * 86400)
  count(K.sums, t.task_type .. ' tasks', 1)
  count(K.sums, t.task_type .. ' ms', ms)
end
if t.fingerprint then redis.call('SET', K.reusable .. t.fingerprint, task_id) end
if t.prefix then redis.call('ZADD', K.media, now, t.prefix) end
count_bytes(t, #result)
set(t, {result = result, progress = 1, current_step = 'upload_complete', ended_run = run})
finish(t, 'completed', {'"result":' .. result}, cms)
return 'ok'
