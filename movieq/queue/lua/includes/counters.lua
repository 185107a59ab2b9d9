-- Counters in hashes.

-- Adds to a counter; one that is damaged starts again.
local function count(key, field, by)
  local answer = redis.pcall('HINCRBYFLOAT', key, field, by)
  if type(answer) == 'table' then redis.pcall('HSET', key, field, math.max(by, 0)) end
end
