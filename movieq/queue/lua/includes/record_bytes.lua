-- The bytes that the records of tasks take, summed up for the quota of their project.
-- include: record counters

local OVERHEAD = {task = 2048, delivery = 1024} -- without their texts: hashes, arq jobs, entries of lists

-- Adds to the bytes of a task's record, and of its project's records. A task of an older version has no bytes, so none are taken off.
local function count_bytes(t, by)
  local before = tonumber(t.bytes or 0)
  local after = math.max(0, before + by)
  set(t, {bytes = after})
  count(K.record_bytes, t.project_id, after - before)
end

-- Deletes the parameters of a task that can no longer run, nor be delivered to the CMS.
local function drop_parameters(t)
  count_bytes(t, -redis.call('STRLEN', K.job .. t.task_id))
  redis.call('DEL', K.job .. t.task_id)
end
