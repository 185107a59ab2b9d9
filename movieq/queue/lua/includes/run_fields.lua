-- The fields of a task that belong to one run, grouped by when they are removed.
-- include: record

local RUN_FIELDS = {
  shown = {'run', 'stage', 'step', 'steps', 'remaining_ms'}, -- removed when the task waits again, since clients see them
  files = {'made_on', 'made_at_ms', 'made_ms'}, -- when a new run starts: until then a worker of that host may store the finished files
  expired = {'reaped', 'refunded', 'orphaned'}, -- when a new run starts, or the run whose lease expired resumes
  gpu = {'gpu_share', 'gpu_at_ms'}, -- when the run ends
  rest = {'logged', 'passed_ms', 'prefix'}, -- when a new run starts
}

local function forget(t, group)
  unset(t, unpack(RUN_FIELDS[group]))
end

-- Removes all fields of earlier runs, when a new run starts.
local function forget_runs(t)
  for group in pairs(RUN_FIELDS) do forget(t, group) end
end

-- Resets what clients see of a run, when the task waits for a new one.
local function show_as_waiting(t)
  forget(t, 'shown')
  set(t, {progress = 0, current_step = 'waiting_in_queue'})
end
