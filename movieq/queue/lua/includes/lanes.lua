-- Lanes: a task waits in the lane of its kind or, once a worker that cannot run it has tried to claim it, in the lane of its task type and
-- model (see claim.lua).

local function lane(t)
  return t.lane or t.kind
end

-- Returns where projects share with the task's project: in its lane or, if its key may use all projects, in the key's flow in that lane.
-- `@` is in no name of a project.
local function scope(t)
  return t.flow and lane(t) .. ':@' .. t.flow or lane(t)
end

-- Returns the key of the project's queue in this lane and flow.
local function queue(t)
  return K.waiting .. scope(t) .. ':' .. t.project_id
end
