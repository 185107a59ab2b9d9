#!lua flags=allow-oom
-- Stores the progress of a run: processing -> processing.
-- args: task_id run progress current_step stage step steps remaining_ms prefix host rendered_ms keep gpu_ms gpu_share lease_ms
--   task_id: of the task
--   run: the run token
--   progress: at least 0, below 1; a lower value than the stored one is ignored
--   current_step: of the contract
--   stage, step, steps: the engine's current stage and step; '' for none
--   remaining_ms: the ETA; '' for none
--   prefix: storage prefix under which the run is about to store its files; '' for none
--   host: that has the run's finished files, which outlive the worker; '' for none
--   rendered_ms: how long the run rendered its files, 0 if it found finished files; '' while it renders
--   keep: '1' to append to the log whatever the progress, else ''
--   gpu_ms: GPU time of the run so far; '' for none
--   gpu_share: share of a GPU that the run uses from now on, 0 to 1; '' for none
--   lease_ms: length of the lease, if the run resumes
-- Returns 'ok'; 'lost' if the task does not belong to the run.
-- Publishes `progress`. Appends it if progress grew by half a percent since the last entry (at most 200 a run), or if `keep` is set.
-- Cost: O(1).
-- include: time record events deadlines gpu resume
local t = load(task_id)
if not holds(t, run, lease_ms) then return 'lost' end
if gpu_share ~= '' then meter(t, gpu_ms, gpu_share) end
local fields = {progress = string.format('%.4f', math.max(tonumber(progress), tonumber(t.progress))), current_step = current_step}
if stage ~= '' then fields.stage = stage end
if step ~= '' then fields.step, fields.steps = step, steps end
if remaining_ms ~= '' then fields.remaining_ms = remaining_ms end
if prefix ~= '' then fields.prefix = prefix end
if host ~= '' then fields.made_on = host end
if rendered_ms ~= '' then fields.made_ms, fields.made_at_ms = rendered_ms, now end
local logged = keep == '1' or fields.progress - (t.logged or 0) >= 0.00499 -- half a percent, less a margin for rounding
if logged then fields.logged = fields.progress end
set(t, fields)
if rendered_ms ~= '' then watch_deadline(t) end -- the files must be stored within a day
if logged then log(t, 'progress') else publish_event(t, 'progress') end
return 'ok'
