#!lua flags=allow-oom
-- Gives a task back: processing -> queued, or failed where its budget is used up.
-- args: task_id run counts limit delay_ms error error_code exit_code stage
--   counts: 'tries' (a fault that may pass), 'deaths' (the child died with it) or 'drain' (nobody's fault, no limit); limit: how many of that kind fail it
--   exit_code, stage: of a child that died, '' for none
-- Returns 'queued' or 'failed', the same when said again by the same run; 'lost' where the run is not the present one.
-- Appends `retrying`, or `failed`. The task waits delay_ms before it is due. Cost: O(log n).
local t = load(task_id)
-- also where another run has begun meanwhile; not for one whose lease was over: it ends only now
if t and t.ended_run == run and t.ended_as and t.reaped ~= run then return t.ended_as end
if not holds(t, run, 0) then return 'lost' end
if counts ~= 'drain' then
  set(t, {[counts] = t[counts] + 1})
  if exit_code ~= '' then set(t, {dead_exit_code = exit_code}) end
  if stage ~= '' then set(t, {dead_stage = stage}) end
  if tonumber(t[counts]) >= tonumber(limit) then
    set(t, {ended_run = run})
    if counts == 'deaths' then bury(t, error) else fail(t, error, error_code, true) end
    return 'failed'
  end
end
put_back(t, tonumber(delay_ms), error, error_code)
return 'queued'
