#!lua flags=allow-oom
-- Compares the counters of tasks with the lists that they count.
-- args: apply
--   apply: '1' to mend, '' only to look
-- Returns what does not agree, as sentences; {} where everything does. Cost: O(projects), and O(waiting tasks) of each kind that has at most 20,000.
local found = {}

local function compare(key, field, is, what)
  local noted = tonumber(redis.call('HGET', key, field) or 0)
  if noted == is then return end
  found[#found + 1] = what .. ' are counted as ' .. noted .. ' but are ' .. is
  if apply == '1' then redis.call('HSET', key, field, is) end
end

local projects = redis.call('ZRANGE', K.projects, 0, -1)
for _, status in ipairs({'queued', 'processing', 'completed', 'failed', 'cancelled'}) do
  local is = 0
  for _, project in ipairs(projects) do is = is + redis.call('ZCARD', K.index .. project .. '|' .. status .. '|') end
  compare(K.totals, status, is, status .. ' tasks')
end

for _, kind in ipairs(redis.call('SMEMBERS', K.kinds)) do
  local is, lanes, waiting = {['1'] = 0, ['2'] = 0, ['3'] = 0}, redis.call('SMEMBERS', K.lanes .. kind), 0
  lanes[#lanes + 1] = kind
  for _, of in ipairs(lanes) do waiting = waiting + redis.call('ZCARD', K.waiting .. of) end
  if waiting <= 20000 then
    for _, of in ipairs(lanes) do
      for _, task_id in ipairs(redis.call('ZRANGE', K.waiting .. of, 0, -1)) do
        local priority = redis.call('HGET', K.task .. task_id, 'priority')
        if is[priority] then is[priority] = is[priority] + 1 end
      end
    end
    for priority, count in pairs(is) do compare(K.priorities .. kind, priority, count, 'waiting tasks of ' .. kind .. ' with priority ' .. priority) end
  end
end
return found
