#!lua flags=allow-oom
-- Compares the task counters with the lists that they count.
-- args: apply
--   apply: '1' to correct the counters, '' only to check
-- Returns the differences as sentences; {} if there are none.
-- Cost: O(projects), and O(n) for each kind with n waiting tasks and each project with n tasks, if there are at most 20,000.
local found = {}

local function compare(key, field, actual, what)
  local counted = redis.call('HGET', key, field) or '0'
  if tonumber(counted) == actual then return end
  found[#found + 1] = what .. ' are counted as ' .. counted .. ' but are ' .. actual
  if apply == '1' then redis.call('HSET', key, field, actual) end
end

local projects = redis.call('ZRANGE', K.projects, 0, -1)
for _, status in ipairs({'queued', 'processing', 'completed', 'failed', 'cancelled'}) do
  local actual = 0
  for _, project in ipairs(projects) do actual = actual + redis.call('ZCARD', K.index .. project .. '|' .. status .. '|') end
  compare(K.totals, status, actual, status .. ' tasks')
end

for _, project in ipairs(projects) do
  local tasks, bytes = K.index .. project .. '||', 0
  if redis.call('ZCARD', tasks) <= 20000 then
    for _, task_id in ipairs(redis.call('ZRANGE', tasks, 0, -1)) do
      local of_task = redis.pcall('HGET', K.task .. task_id, 'bytes')
      bytes = bytes + (type(of_task) == 'string' and tonumber(of_task) or 0)
    end
    compare(K.record_bytes, project, bytes, 'bytes of the task records of project ' .. project)
  end
end

for _, kind in ipairs(redis.call('SMEMBERS', K.kinds)) do
  local by_priority, lanes, waiting = {['1'] = 0, ['2'] = 0, ['3'] = 0}, redis.call('SMEMBERS', K.lanes .. kind), 0
  lanes[#lanes + 1] = kind
  for _, of in ipairs(lanes) do waiting = waiting + redis.call('ZCARD', K.waiting .. of) end
  if waiting <= 20000 then
    for _, of in ipairs(lanes) do
      for _, task_id in ipairs(redis.call('ZRANGE', K.waiting .. of, 0, -1)) do
        local priority = redis.pcall('HGET', K.task .. task_id, 'priority')
        if by_priority[priority] then by_priority[priority] = by_priority[priority] + 1 end
      end
    end
    for priority, actual in pairs(by_priority) do
      compare(K.priorities .. kind, priority, actual, 'waiting tasks of ' .. kind .. ' with priority ' .. priority)
    end
  end
end
return found
