#!lua flags=allow-oom
-- Lists the files of old results for deletion. No task reuses these results any more.
-- args: age_ms batch
--   age_ms: time since the result was committed
--   batch: the most results in one call
-- Returns the number of results; if it is `batch`, there may be more.
-- Appends nothing.
-- Cost: O(batch log n).
-- include: time
local old = redis.call('ZRANGEBYSCORE', K.media, '-inf', now - age_ms, 'LIMIT', 0, batch)
for _, prefix in ipairs(old) do
  redis.call('ZADD', K.orphans, now, prefix)
  redis.call('ZREM', K.media, prefix)
end
return #old
