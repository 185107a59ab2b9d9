#!lua flags=allow-oom
-- Ends a run whose fault no retry can mend: processing -> failed.
-- args: task_id run error error_code
-- Returns 'ok', also when said again by the same run; 'lost' where the run is not the present one.
-- Appends `failed`; the log expires in 24 h; fills the outbox. Cost: O(log n).
local t = load(task_id)
if t and t.ended_run == run and t.ended_as == 'failed' then return 'ok' end -- also where it was retried meanwhile
if not holds(t, run, 0) then return 'lost' end
set(t, {ended_run = run})
fail(t, error, error_code, false)
return 'ok'
