#!lua
-- Writes as a submit does, to a key of its own: it is refused exactly where a submit would be.
-- args: expires_ms
-- Returns 'ok'. Cost: O(1).
redis.call('SET', K.write_check, now, 'PX', expires_ms)
return 'ok'
