-- Runs: their leases, and their end.
-- include: time record run_fields fair_share gpu

-- Gives the task's run a lease.
local function lease(t, lease_ms)
  redis.call('ZADD', K.running .. t.kind, now + lease_ms, t.task_id)
  redis.call('SADD', K.worker_tasks .. t.worker_id, t.task_id)
end

-- Returns how long the run has rendered (ms), without the time in which finished files waited for an unavailable storage.
local function worked(t)
  return tonumber(t.made_ms or now - t.started_at_ms)
end

-- Ends the run: its GPU time is counted, its lease removed, its charge corrected from the estimate to the true time, and its stored files
-- are listed for deletion unless committed.
local function release(t, committed)
  bill(t)
  if t.reaped ~= t.run then forget(t, 'gpu') end -- a run whose lease expired may resume, and still uses its GPU
  redis.call('ZREM', K.running .. t.kind, t.task_id)
  redis.call('SREM', K.worker_tasks .. t.worker_id, t.task_id)
  charge(t, worked(t) - t.estimate_ms)
  if t.prefix and not committed then
    redis.call('ZADD', K.orphans, now + 60000, t.prefix)
    set(t, {orphaned = t.prefix})
  end
  unset(t, 'prefix')
end
