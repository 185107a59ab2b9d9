-- The queue: tasks in the order in which they are claimed.
-- include: counters index lanes fair_share wake

-- Adds the task to the queue of its project, flow and lane, ordered by age and priority.
local function enqueue(t)
  redis.call('ZADD', queue(t), created(t) - t.bias_ms, t.task_id)
  redis.call('ZADD', K.waiting .. lane(t), created(t), t.task_id)
  count(K.priorities .. t.kind, t.priority, 1)
  if t.lane then redis.call('SADD', K.lanes .. t.kind, t.lane) end
  join_share(t)
  wake(t.kind)
end

local function dequeue(t)
  redis.call('ZREM', K.delayed, t.task_id)
  if redis.call('ZREM', K.waiting .. lane(t), t.task_id) == 1 then count(K.priorities .. t.kind, t.priority, -1) end
  if redis.call('ZREM', queue(t), t.task_id) == 1 then leave_share(t) end
end
