-- Tasks with finished files on a host. They are offered to the workers of that host first.
-- include: time

-- Offers the task to the workers of its host for a minute after it is due; then it waits for any worker. Returns whether it has finished
-- files.
local function offer(t, delay_ms)
  if not t.made_on then return false end
  redis.call('ZADD', K.offered .. t.made_on, now + delay_ms, t.task_id)
  redis.call('EXPIRE', K.offered .. t.made_on, 86400)
  redis.call('ZADD', K.delayed, now + delay_ms + 60000, t.task_id)
  return true
end
