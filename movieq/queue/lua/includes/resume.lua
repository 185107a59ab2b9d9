-- Fencing for the verbs of runs. It lets a run whose lease has expired resume.
-- include: time record run_fields index events queue deadlines fair_share fence runs

-- Returns whether the task belongs to the run. A run whose lease has expired resumes if the task is still waiting and the files that the
-- run stored are not about to be deleted; this appends `started`.
local function holds(t, run, lease_ms)
  if is_current(t, run) then return true end
  if not t or t.status ~= 'queued' or t.reaped ~= run then return false end
  if t.orphaned and tonumber(redis.call('ZSCORE', K.orphans, t.orphaned) or 0) <= now then return false end
  dequeue(t)
  charge(t, -t.refunded)
  set(t, {run = run, silences = t.silences - 1})
  if t.orphaned then
    redis.call('ZREM', K.orphans, t.orphaned)
    set(t, {prefix = t.orphaned})
  end
  forget(t, 'expired')
  unset(t, 'ended_run', 'ended_as')
  move(t, 'processing')
  lease(t, lease_ms)
  watch_deadline(t)
  log(t, 'started')
  return true
end
