-- The end of a task that is queued or processing.
-- include: queue runs conclude

local function finish(t, status, extra, cms)
  if t.status == 'processing' then release(t, status == 'completed') else dequeue(t) end
  redis.call('ZREM', K.deadlines, t.task_id)
  conclude(t, status, extra, cms)
end
