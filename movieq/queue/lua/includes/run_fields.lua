-- The fields of a task that tell of one run, each named here alone, by when the task forgets them.
-- include: record

local RUN_FIELDS = {
  shown = {'run', 'stage', 'step', 'steps', 'remaining_ms'}, -- when it waits again: clients see them
  files = {'made_on', 'made_at_ms', 'made_ms'}, -- when a new run begins: until then a worker of that host may store the finished files
  expired = {'reaped', 'refunded', 'orphaned'}, -- when a new run begins or the reaped one resumes
  gpu = {'gpu_share', 'gpu_at_ms'}, -- when the run ends
  rest = {'logged', 'passed_ms', 'prefix'}, -- when a new run begins
}

local function forget(t, group)
  unset(t, unpack(RUN_FIELDS[group]))
end

-- A new run begins.
local function forget_runs(t)
  for group in pairs(RUN_FIELDS) do forget(t, group) end
end

-- The task waits for a new run.
local function show_as_waiting(t)
  forget(t, 'shown')
  set(t, {progress = 0, current_step = 'waiting_in_queue'})
end
