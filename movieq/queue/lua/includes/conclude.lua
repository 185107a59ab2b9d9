-- The end of a task that is in no queue and has no run.
-- include: time record index events outbox

-- The task gets its final state: the event is appended, the log expires in 24 h, the outbox is filled.
local function conclude(t, status, extra, cms)
  redis.call('ZADD', K.ended, now, t.task_id)
  set(t, {ended_at_ms = now})
  unset(t, 'remaining_ms')
  move(t, status)
  log(t, status, extra)
  redis.call('EXPIRE', K.log .. t.task_id, 86400)
  deliver(t, status, cms)
end
