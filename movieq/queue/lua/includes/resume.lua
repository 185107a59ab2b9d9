-- The fence of the verbs of runs, which lets a run whose lease expired go on.
-- include: time record run_fields index events queue deadlines fair_share fence runs

-- Returns whether the run holds its task. A run whose lease expired resumes here if the task still waits and the files that the run stored
-- are not about to be deleted; that appends `started`.
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
