-- The time of Redis: `now` in milliseconds since 1970, and the seconds and microseconds that it is made of.
local seconds, micros = unpack(redis.call('TIME'))
local now = seconds * 1000 + math.floor(micros / 1000)
