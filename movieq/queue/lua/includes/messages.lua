-- Pub/sub messages, and their JSON.

-- Returns the time (ms since 1970) as RFC 3339 in UTC. The date is computed with H. Hinnant's algorithm civil_from_days.
local function rfc3339(ms)
  local days, rest = math.floor(ms / 86400000), ms % 86400000
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day,
    math.floor(rest / 3600000), math.floor(rest / 60000) % 60, math.floor(rest / 1000) % 60, rest % 1000)
end

local function json(value)
  if value == nil then return 'null' end
  return cjson.encode(value)
end

-- Publishes to the subscribers of `name`, a task or project:PROJECT. `id` is the id of the log entry. For an event that is in no log it is
-- '>' and the time, so that a receiver that has read the log can skip older messages.
local function publish(name, id, event_type, data)
  redis.call('PUBLISH', K.events .. name, id .. '\n' .. event_type .. '\n' .. data)
end
