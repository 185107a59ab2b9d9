-- Deadlines: when `tidy` fails a task that has not started or finished.

-- Sets the task's deadline. While it waits: the earlier of start_by (only before its first run) and finish_by. While it runs: the earlier
-- of finish_by and the time limit of its run or, once its files are finished, a day to store them.
local function watch_deadline(t)
  local at = tonumber(t.finish_by_ms or math.huge)
  if t.status == 'processing' then
    at = math.min(at, t.made_at_ms and t.made_at_ms + 86400000 or t.started_at_ms + t.max_ms)
  elseif tonumber(t.attempt) == 0 then
    at = math.min(at, tonumber(t.start_by_ms or math.huge))
  end
  if at < math.huge then
    redis.call('ZADD', K.deadlines, at, t.task_id)
  else
    redis.call('ZREM', K.deadlines, t.task_id)
  end
end
