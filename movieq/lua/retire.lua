#!lua flags=allow-oom
-- Lists the files of results that were committed long ago for deletion, as orphans: no other task is given them any more.
-- args: age_ms batch
-- Returns how many; where it is `batch`, there may be more. Cost: O(batch log n).
local old = redis.call('ZRANGEBYSCORE', K.media, '-inf', now - age_ms, 'LIMIT', 0, batch)
for _, prefix in ipairs(old) do
  redis.call('ZADD', K.orphans, now, prefix)
  redis.call('ZREM', K.media, prefix)
end
return #old
