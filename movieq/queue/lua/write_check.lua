#!lua
-- Writes a test key. Redis refuses this exactly when it would refuse a submit.
-- args: expires_ms
--   expires_ms: time until the key expires
-- Returns 'ok'.
-- Cost: O(1).
-- include: time
redis.call('SET', K.write_check, now, 'PX', expires_ms)
return 'ok'
