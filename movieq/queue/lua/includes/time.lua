-- The time of Redis: `now` in milliseconds since 1970, computed from `seconds` and `micros`.
local seconds, micros = unpack(redis.call('TIME'))
local now = seconds * 1000 + math.floor(micros / 1000)
