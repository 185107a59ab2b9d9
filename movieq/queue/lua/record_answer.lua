#!lua flags=allow-oom
-- Records whether the receiver of a webhook answered in time. After three timeouts in a row its host is unresponsive for the project: none
-- of its webhooks is sent there for half a minute, then a single one as a probe, and for twice as long after each further timeout, up to
-- ten minutes. An answer ends this, and makes the deliveries due that waited for it.
-- args: delivery_id answered
--   delivery_id: TASK-NUMBER
--   answered: '1' for any answer, '' for a timeout
-- Returns for how many ms no webhook is sent to the host, if this has to be logged: at most once a minute for each host; else 0. Repeated
--   for the same try, it has the same answer.
-- Appends nothing. What is stored of a host expires an hour after its last timeout, or after the next probe is due.
-- Cost: O(log n) for each of at most 1,000 deliveries that waited; with more, the next answers make the others due.
-- include: time hosts delivery_jobs
local TIMEOUTS, SHORTEST_MS = 3, 30000
local project, url, tries = unpack(redis.call('HMGET', K.delivery .. delivery_id, 'project_id', 'url', 'tries'))
if not url then return 0 end -- it was swept
local receiver = receiver_of(project, url)
local key = K.unresponsive .. receiver

if answered == '1' then
  redis.call('DEL', key)
  for _, waiting in ipairs(redis.call('SPOP', K.held_back .. receiver, 1000)) do make_due(waiting) end
  return 0
end

local timeouts, until_ms, last_try, logged_ms = unpack(redis.call('HMGET', key, 'timeouts', 'until_ms', 'last_try', 'logged_ms'))
local this = delivery_id .. ' ' .. (tries or 0)
if last_try == this then return tonumber(logged_ms or '') or 0 end -- the answer to this call was lost
if valid(until_ms, LONGEST_MS) > now then return 0 end -- a try that began before the others timed out
timeouts = (tonumber(timeouts or '') or 0) + 1
local wait_ms = timeouts < TIMEOUTS and 0 or math.min(SHORTEST_MS * 2 ^ (timeouts - TIMEOUTS), LONGEST_MS)
local logs = wait_ms > 0 and redis.call('SET', K.host_logged .. host_of(url), '1', 'NX', 'PX', 60000)
redis.call('HSET', key, 'timeouts', timeouts, 'last_try', this, 'logged_ms', logs and wait_ms or 0)
if wait_ms > 0 then redis.call('HSET', key, 'until_ms', now + wait_ms) end
redis.call('HDEL', key, 'probe', 'probe_ms')
redis.call('PEXPIRE', key, wait_ms + 3600000)
return logs and wait_ms or 0
