-- The bytes that the records of tasks take, summed up for the quota of their project.
-- include: record counters

local OVERHEAD = 2048 -- of a task without its texts: hash, indexes, deliveries
local COPIES = 3 -- metadata and result are in the task's hash and in those of up to two deliveries

-- Adds to the bytes of a task's record, and of its project's records.
local function count_bytes(t, by)
  set(t, {bytes = math.max(0, (t.bytes or 0) + by)})
  count(K.record_bytes, t.project_id, by)
end

-- Deletes the parameters of a task that can no longer run, nor be delivered to the CMS.
local function drop_parameters(t)
  count_bytes(t, -redis.call('STRLEN', K.job .. t.task_id))
  redis.call('DEL', K.job .. t.task_id)
end
