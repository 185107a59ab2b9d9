#!lua flags=allow-oom
-- Deletes tasks that ended long ago: hash, arq job, log, deliveries, and their entry in every list.
-- args: age_ms batch
--   age_ms: time since the task ended
--   batch: the most tasks in one call
-- Returns {number of tasks removed from the list of ended tasks, {task_id of each with a damaged record, ...}}; if the number is `batch`,
--   there may be more.
-- A damaged record is deleted too, but some lists may keep its entry. A listed task that has not ended is not deleted.
-- Files are swept by their own age. Appends nothing.
-- Cost: O(batch log n).
-- include: time counters record index lanes
local function sweep(task_id)
  local t = load(task_id)
  if not t then return end
  discard(t)
  for _, status in ipairs({'', t.status}) do
    redis.call('ZREM', index(t, status, ''), task_id)
    redis.call('ZREM', index(t, status, t.task_type), task_id)
  end
  count(K.totals, t.status, -1)
  if t.bytes then count(K.record_bytes, t.project_id, -t.bytes) end
  local lists = {} -- of the project; several, since a single list could be missing although the project has tasks
  for _, status in ipairs({'', 'queued', 'processing', 'completed', 'failed', 'cancelled'}) do lists[#lists + 1] = index(t, status, '') end
  if redis.call('EXISTS', unpack(lists)) == 0 then
    redis.call('ZREM', K.projects, t.project_id)
    for _, of in ipairs({t.kind, lane(t)}) do
      redis.call('HDEL', K.idle_virtual_times .. of, t.project_id)
      redis.call('DEL', K.idle_virtual_times .. of .. ':' .. t.project_id)
    end
    redis.call('HDEL', K.gpu_ms, t.project_id)
    redis.call('HDEL', K.record_bytes, t.project_id)
    redis.call('DEL', K.log .. 'project:' .. t.project_id)
  end
  if t.fingerprint and redis.call('GET', K.reusable .. t.fingerprint) == task_id then redis.call('DEL', K.reusable .. t.fingerprint) end
  for n = 1, tonumber(t.deliveries or 0) do redis.call('DEL', K.delivery .. task_id .. '-' .. n) end
end

local old, damaged = redis.call('ZRANGEBYSCORE', K.ended, '-inf', now - age_ms, 'LIMIT', 0, batch), {}
for _, task_id in ipairs(old) do
  local status = redis.pcall('HGET', K.task .. task_id, 'status')
  if status ~= 'queued' and status ~= 'processing' then
    if not pcall(sweep, task_id) then damaged[#damaged + 1] = task_id end
    redis.call('ZREM', K.dead, task_id)
    redis.call('UNLINK', K.task .. task_id, K.job .. task_id, K.log .. task_id)
  end
  redis.call('ZREM', K.ended, task_id)
end
return {#old, damaged}
