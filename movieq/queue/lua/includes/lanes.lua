-- Lanes: a task waits in the lane of its kind or, once a worker that cannot run it has tried to claim it, in the lane of its task type and
-- model (see claim.lua).

local function lane(t)
  return t.lane or t.kind
end

-- Returns the key of the project's queue in this lane.
local function queue(t)
  return K.waiting .. lane(t) .. ':' .. t.project_id
end
