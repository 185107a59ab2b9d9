#!lua flags=allow-oom
-- Takes tokens from a client's token bucket; each request costs one. The bucket is stored as the time at which it is full again
-- (the generic cell rate algorithm), so an unused bucket needs no key.
-- args: client per_s burst wanted
--   client: the hash of an API key, or the subject of a signed URL
--   per_s: tokens that are added in a second
--   burst: tokens in a full bucket
--   wanted: the most tokens to take
-- Returns {tokens taken, tokens left, ms until there is one}.
-- The key expires when the bucket is full.
-- Cost: O(1).
-- include: time
local key, token_ms = K.tokens .. client, 1000 / per_s
local full_at = math.max(tonumber(redis.call('GET', key) or now) or now, now)
full_at = math.min(full_at, now + burst * token_ms) -- later if the clock has stepped back
local tokens = math.floor((now + burst * token_ms - full_at) / token_ms + 1e-6)
local taken = math.max(0, math.min(tokens, tonumber(wanted)))
if taken == 0 then return {0, 0, math.ceil(full_at + token_ms - now - burst * token_ms)} end
full_at = full_at + taken * token_ms
redis.call('SET', key, string.format('%.3f', full_at), 'PX', math.ceil(full_at - now))
return {taken, tokens - taken, 0}
