#!lua flags=allow-oom
-- Removes an upload whose file could not be stored: it no longer counts for its project.
-- args: upload_id project_id prefix size
--   upload_id: of the upload
--   project_id: of its project
--   prefix: storage prefix of its file, which may be stored in part: listed for deletion in a minute
--   size: bytes that it counts
-- Returns 1 if the upload was removed; 0 if there was none.
-- Cost: O(log n).
-- include: time
local list, total, entry = K.uploads .. project_id, K.upload_bytes .. project_id, size .. ' ' .. upload_id
if not redis.call('ZSCORE', list, entry) then return 0 end
local left = math.max(0, (tonumber(redis.call('GET', total) or 0) or 0) - size)
redis.call('DEL', K.upload .. upload_id)
redis.call('ZREM', list, entry)
redis.call('SET', total, string.format('%.0f', left), 'XX', 'KEEPTTL')
redis.call('ZADD', K.orphans, now + 60000, prefix)
return 1
