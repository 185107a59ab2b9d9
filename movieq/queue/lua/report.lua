#!lua flags=allow-oom
-- Says how far a run is: processing -> processing.
-- args: task_id run progress current_step stage step steps remaining_ms prefix host made_ms keep gpu_ms gpu_share lease_ms
--   progress: 0 to below 1, never falls; stage, step, steps, remaining_ms, prefix: '' for none; prefix: where the run is about to store its files; host: where
--   they lie finished, and outlive the worker; made_ms: how long it worked for them, 0 where it found them there, '' while it works; keep: '1' for what belongs in
--   the log whatever the progress; gpu_ms: what the run has had of a GPU so far, gpu_share: how much of one it has from now on, 0 to 1 ('' where it has none);
--   lease_ms: of a lease that is taken back
-- Returns 'ok', or 'lost' where the run is not the present one.
-- Publishes `progress`; appends it to the log where it grew by half a percent since the last entry (at most 200 a run), or is kept. Cost: O(1).
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
if made_ms ~= '' then watch_deadline(t) end -- it has a day to store them
if logged then log(t, 'progress') else tell(t, 'progress') end
return 'ok'
