#!lua flags=allow-oom
-- Requeues the task of a run that ends without a result: processing -> queued, or failed once its budget is used up.
-- args: task_id run budget limit delay_ms error error_code exit_code stage
--   task_id: of the task
--   run: the run token
--   budget: 'tries' (a recoverable error), 'deaths' (the engine process died) or 'drain' (the worker stops; no limit)
--   limit: the size of the budget
--   delay_ms: until the task is due again
--   error: a sentence for the client
--   error_code: of the contract
--   exit_code, stage: of an engine process that died; '' for none
-- Returns 'queued' or 'failed', the same for a repeated call of the same run; 'lost' if the task does not belong to the run.
-- Appends `retrying`; or appends `failed` and adds deliveries to the outbox.
-- Cost: O(log n).
-- include: record resume failure requeue
local t = load(task_id)
-- even if another run has started since; but a run whose lease expired has not ended before this call
if t and t.ended_run == run and t.ended_as and t.reaped ~= run then return t.ended_as end
if not holds(t, run, 0) then return 'lost' end
if budget ~= 'drain' then
  set(t, {[budget] = t[budget] + 1})
  if exit_code ~= '' then set(t, {dead_exit_code = exit_code}) end
  if stage ~= '' then set(t, {dead_stage = stage}) end
  if tonumber(t[budget]) >= tonumber(limit) then
    set(t, {ended_run = run})
    if budget == 'deaths' then fail_as_dead_letter(t, error) else fail(t, error, error_code, true) end
    return 'failed'
  end
end
requeue(t, tonumber(delay_ms), error, error_code)
return 'queued'
