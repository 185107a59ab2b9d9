#!lua
-- Writes a key of its own as a submit would: Redis refuses it exactly when it would refuse a submit.
-- args: expires_ms
--   expires_ms: of the key
-- Returns 'ok'.
-- Cost: O(1).
-- include: time
redis.call('SET', K.write_check, now, 'PX', expires_ms)
return 'ok'
