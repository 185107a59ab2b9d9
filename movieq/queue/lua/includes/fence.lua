-- The fence: only the current run of a task changes it.

-- Returns whether this run is the current one of a task in processing.
local function is_current(t, run)
  return t ~= nil and t.status == 'processing' and t.run == run
end
