#!lua
-- Adds an upload to those of its project, or only checks whether it may be added. Redis refuses it if its memory is full.
-- args: upload_id project_id upload prefix size max_bytes kept_ms
--   upload_id: of the upload
--   project_id: of its project
--   upload: Upload (msgpack), stored unchanged; '' to add nothing
--   prefix: storage prefix of its file, listed for deletion when the upload expires
--   size: bytes that it counts
--   max_bytes: limit of the bytes of the project's uploads; 0 for none
--   kept_ms: time until it expires
-- Returns {'ok'}; {'quota', bytes, ms until the oldest upload expires} if the project's uploads would take more than max_bytes.
-- The upload, and the list of the project's uploads after its latest, expire.
-- Cost: O(log n); at most 1,000 expired uploads a call are removed from the list.
-- include: time
local list, total = K.uploads .. project_id, K.upload_bytes .. project_id
local taken = tonumber(redis.call('GET', total) or 0) or 0

if redis.call('EXISTS', K.upload .. upload_id) == 1 then return {'ok'} end -- a repeated call
for _, each in ipairs(redis.call('ZRANGEBYSCORE', list, '-inf', now, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', list, each)
  taken = taken - (tonumber(string.match(each, '^%d+')) or 0)
end
if redis.call('EXISTS', list) == 0 then taken = 0 end
taken = math.max(0, taken)
redis.call('SET', total, string.format('%.0f', taken), 'XX', 'KEEPTTL')
if tonumber(max_bytes) > 0 and taken + size > tonumber(max_bytes) then
  local oldest = redis.call('ZRANGE', list, 0, 0, 'WITHSCORES')[2]
  return {'quota', taken, oldest and math.max(1, oldest - now) or 1}
end
if upload == '' then return {'ok'} end
redis.call('SET', K.upload .. upload_id, upload, 'PX', kept_ms)
redis.call('ZADD', list, now + kept_ms, size .. ' ' .. upload_id)
redis.call('PEXPIRE', list, kept_ms)
redis.call('SET', total, string.format('%.0f', taken + size), 'PX', kept_ms)
redis.call('ZADD', K.orphans, now + kept_ms, prefix)
return {'ok'}
