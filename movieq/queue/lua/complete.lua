#!lua flags=allow-oom
-- Commits a result: processing -> completed.
-- args: task_id run result cms
--   result: JSON of StoredResult; passes through as it is; cms: address of the CMS's collection that is to have it, '' for none
-- Returns 'ok', also when said again by the same run; 'lost' where the run is not the present one.
-- Appends `completed`; the log expires in 24 h; fills the outbox; remembers how long tasks of this shape take, and that this was made. Cost: O(log n).
local t = load(task_id)
if t and t.status == 'completed' and t.ended_run == run then return 'ok' end
if not holds(t, run, 0) then return 'lost' end
if t.made_ms ~= '0' then -- else it found its files made, and says nothing of others
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
