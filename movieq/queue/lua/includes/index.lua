-- The lists of a project's tasks by state and task type, and the counters of all tasks by state.
-- include: counters record

-- Returns the time of submission in milliseconds, with a fraction, so that tasks of the same millisecond keep their order.
local function created(t)
  return t.created_at_ms + t.created_us / 1000
end

local function index(t, status, task_type)
  return K.index .. t.project_id .. '|' .. status .. '|' .. task_type
end

-- Changes the task's state, and moves it to the lists of that state.
local function move(t, status)
  if t.status then
    redis.call('ZREM', index(t, t.status, ''), t.task_id)
    redis.call('ZREM', index(t, t.status, t.task_type), t.task_id)
    count(K.totals, t.status, -1)
  end
  redis.call('ZADD', index(t, status, ''), created(t), t.task_id)
  redis.call('ZADD', index(t, status, t.task_type), created(t), t.task_id)
  count(K.totals, status, 1)
  set(t, {status = status})
end
