-- Counters in hashes.

-- Adds to a counter; a damaged one is reset first.
local function count(key, field, by)
  local answer = redis.pcall('HINCRBYFLOAT', key, field, by)
  if type(answer) == 'table' then redis.pcall('HSET', key, field, math.max(by, 0)) end
end
