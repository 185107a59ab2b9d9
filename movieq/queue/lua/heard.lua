#!lua flags=allow-oom
-- Records whether the receiver of a webhook answered in time. After three timeouts in a row its host is unresponsive: no webhook is sent to
-- it for half a minute, then a single one as a probe, and for twice as long after each further timeout, up to ten minutes. An answer ends
-- this, and makes the deliveries due that waited for it.
-- args: delivery_id answered
--   delivery_id: TASK-NUMBER
--   answered: '1' for any answer, '' for a timeout
-- Returns for how many ms no webhook is sent to the host, if this has to be logged: at most once a minute; else 0.
-- Appends nothing. What is stored of a host expires an hour after the next probe is due.
-- Cost: O(log n) for each of at most 1,000 deliveries that waited; with more, the next answers make the others due.
-- include: time hosts delivery_jobs
local TIMEOUTS, SHORTEST_MS, LONGEST_MS = 3, 30000, 600000
local host = host_of(redis.call('HGET', K.delivery .. delivery_id, 'url'))
if host == '' then return 0 end
local key = K.unresponsive .. host

if answered == '1' then
  if redis.call('HDEL', key, 'timeouts', 'until_ms', 'probe_ms') > 0 then redis.call('PEXPIRE', key, 60000) end -- `logged_ms` stays
  for _, waiting in ipairs(redis.call('SPOP', K.held_back .. host, 1000)) do make_due(waiting) end
  return 0
end

local timeouts, until_ms, logged_ms = unpack(redis.call('HMGET', key, 'timeouts', 'until_ms', 'logged_ms'))
if (tonumber(until_ms or '') or 0) > now then return 0 end -- a try that began before the others timed out
timeouts = (tonumber(timeouts or '') or 0) + 1
redis.call('HSET', key, 'timeouts', timeouts)
if timeouts < TIMEOUTS then
  redis.call('PEXPIRE', key, LONGEST_MS)
  return 0
end
local wait_ms = math.min(SHORTEST_MS * 2 ^ (timeouts - TIMEOUTS), LONGEST_MS)
redis.call('HSET', key, 'until_ms', now + wait_ms)
redis.call('HDEL', key, 'probe_ms')
redis.call('PEXPIRE', key, wait_ms + 3600000)
if now - (tonumber(logged_ms or '') or 0) < 60000 then return 0 end
redis.call('HSET', key, 'logged_ms', now)
return wait_ms
