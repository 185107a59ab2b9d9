-- Fencing: only the current run of a task may change it.

-- Returns whether the task is processing and this is its current run.
local function is_current(t, run)
  return t ~= nil and t.status == 'processing' and t.run == run
end
