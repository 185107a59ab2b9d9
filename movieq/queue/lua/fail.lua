#!lua flags=allow-oom
-- Fails the task of a run without another try: processing -> failed.
-- args: task_id run error error_code
--   task_id: of the task
--   run: the run token
--   error: a sentence for the client
--   error_code: of the contract
-- Returns 'ok', also for a repeated call of the same run; 'lost' if the task does not belong to the run.
-- Appends `failed` and adds deliveries to the outbox. The log expires in 24 h.
-- Cost: O(log n).
-- include: record resume failure
local t = load(task_id)
if t and t.ended_run == run and t.ended_as == 'failed' then return 'ok' end -- even if the task has been retried since
if not holds(t, run, 0) then return 'lost' end
set(t, {ended_run = run})
fail(t, error, error_code, false)
return 'ok'
