#!lua flags=allow-oom
-- Lists the files of results committed long ago for deletion; no other task reuses them any more.
-- args: age_ms batch
--   age_ms: since the commit
--   batch: the most in one call
-- Returns how many; if it is `batch`, there may be more.
-- Appends nothing.
-- Cost: O(batch log n).
-- include: time
local old = redis.call('ZRANGEBYSCORE', K.media, '-inf', now - age_ms, 'LIMIT', 0, batch)
for _, prefix in ipairs(old) do
  redis.call('ZADD', K.orphans, now, prefix)
  redis.call('ZREM', K.media, prefix)
end
return #old
