-- Tasks whose finished files lie on a host: they are offered to its workers first.
-- include: time

-- Offers the task from when it is due, for a minute; then it waits like any other. Returns whether there are finished files.
local function offer(t, delay_ms)
  if not t.made_on then return false end
  redis.call('ZADD', K.offered .. t.made_on, now + delay_ms, t.task_id)
  redis.call('EXPIRE', K.offered .. t.made_on, 86400)
  redis.call('ZADD', K.delayed, now + delay_ms + 60000, t.task_id)
  return true
end
