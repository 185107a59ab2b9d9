-- The end of a task that is in no queue and has no lease.
-- include: time record record_bytes index events outbox

-- Gives the task its final state, appends the event, lets the log expire in 24 h, and adds deliveries to the outbox. The parameters stay
-- stored for a retry of a failed task, and for the CMS.
local function conclude(t, status, extra, cms)
  redis.call('ZADD', K.ended, now, t.task_id)
  set(t, {ended_at_ms = now})
  unset(t, 'remaining_ms')
  move(t, status)
  log(t, status, extra)
  redis.call('EXPIRE', K.log .. t.task_id, 86400)
  deliver(t, status, cms)
  if status == 'cancelled' or status == 'completed' and (cms or '') == '' then drop_parameters(t) end
end
