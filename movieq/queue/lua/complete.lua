#!lua flags=allow-oom
-- Commits the result of a run: processing -> completed.
-- args: task_id run result cms
--   task_id: of the task
--   run: the run token
--   result: JSON of StoredResult, stored unchanged
--   cms: address of the CMS collection that gets the result; '' for none
-- Returns 'ok', also for a repeated call of the same run; 'lost' if the run does not hold the task.
-- Appends `completed` and fills the outbox; the log expires in 24 h. Stores how long tasks of this shape take, for 30 days, and that this task
--   has the result of its fingerprint.
-- Cost: O(log n).
-- include: time record counters resume runs finish
local t = load(task_id)
if t and t.status == 'completed' and t.ended_run == run then return 'ok' end
if not holds(t, run, 0) then return 'lost' end
if t.made_ms ~= '0' then -- else the run found finished files, and its time says nothing about others
  local ms = worked(t)
  if redis.call('LPUSH', K.durations .. t.shape, ms) > 42 then redis.call('LTRIM', K.durations .. t.shape, 0, 20) end
  redis.call('EXPIRE', K.durations .. t.shape, 30 * 86400)
  count(K.sums, t.task_type .. ' tasks', 1)
  count(K.sums, t.task_type .. ' ms', ms)
end
if t.fingerprint then redis.call('SET', K.made .. t.fingerprint, task_id) end
if t.prefix then redis.call('ZADD', K.media, now, t.prefix) end
set(t, {result = result, progress = 1, current_step = 'upload_complete', ended_run = run})
finish(t, 'completed', {'"result":' .. result}, cms)
return 'ok'
