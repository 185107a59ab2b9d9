#!lua flags=allow-oom
-- Puts the files of results that were committed long ago on the list of orphans, to be deleted; no other task is given them any more.
-- args: age_ms batch
-- Returns how many; where it is `batch`, there may be more. Cost: O(batch log n).
local old = redis.call('ZRANGEBYSCORE', K.media, '-inf', now - age_ms, 'LIMIT', 0, batch)
for _, prefix in ipairs(old) do
  redis.call('ZADD', K.orphans, now, prefix)
  redis.call('ZREM', K.media, prefix)
end
return #old
