#!lua flags=allow-oom
-- Stores the progress of a run: processing -> processing.
-- args: task_id run progress current_step stage step steps remaining_ms prefix host made_ms keep gpu_ms gpu_share lease_ms
--   task_id: of the task
--   run: the run token
--   progress: from 0 to below 1; the stored one never falls
--   current_step: of the contract
--   stage, step, steps: where the engine is; '' for none
--   remaining_ms: the ETA; '' for none
--   prefix: storage prefix under which the run is about to store its files; '' for none
--   host: of the finished files, which outlive the worker; '' for none
--   made_ms: how long the run worked until its files were finished, 0 if it found them finished; '' while it works
--   keep: '1' for what the log gets whatever the progress, else ''
--   gpu_ms: what the run has used of a GPU so far; '' for none
--   gpu_share: what it uses of one from now on, 0 to 1; '' for none
--   lease_ms: of a run that resumes
-- Returns 'ok'; 'lost' if the run does not hold the task.
-- Publishes `progress`; appends it if progress grew by half a percent since the last entry (at most 200 a run), or `keep` is set.
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
if made_ms ~= '' then fields.made_ms, fields.made_at_ms = made_ms, now end
local logged = keep == '1' or fields.progress - (t.logged or 0) >= 0.00499 -- half a percent, less what binary fractions lose
if logged then fields.logged = fields.progress end
set(t, fields)
if made_ms ~= '' then watch_deadline(t) end -- a day to store them
if logged then log(t, 'progress') else publish_event(t, 'progress') end
return 'ok'
