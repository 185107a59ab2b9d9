#!lua flags=allow-oom
-- Ends a run whose error no retry can mend: processing -> failed.
-- args: task_id run error error_code
--   task_id: of the task
--   run: the run token
--   error: a sentence for the client
--   error_code: of the contract
-- Returns 'ok', also for a repeated call of the same run; 'lost' if the run does not hold the task.
-- Appends `failed` and fills the outbox; the log expires in 24 h.
-- Cost: O(log n).
-- include: record resume failure
local t = load(task_id)
if t and t.ended_run == run and t.ended_as == 'failed' then return 'ok' end -- also if it was retried meanwhile
if not holds(t, run, 0) then return 'lost' end
set(t, {ended_run = run})
fail(t, error, error_code, false)
return 'ok'
