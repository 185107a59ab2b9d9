#!lua flags=allow-oom
-- Holds a task against the lists that name it, and mends what does not fit together.
-- args: task_id apply ...
--   apply: '1' to mend, '' to look only; rest: keys of sorted sets that were seen to name the task
-- Returns what does not fit, as sentences about the task; {} where everything does. Appends nothing; a delivery that waits in no queue is due at once.
-- Cost: O(log n), O(deliveries of the task).
local found = {}
local mending = apply == '1'

-- Notes a misfit, and mends it where that is asked for.
local function misfit(text, ...)
  found[#found + 1] = text
  if mending and select('#', ...) > 0 then redis.call(...) end
end

local function holds_entry(key)
  return redis.call('ZSCORE', key, task_id)
end

local function check_index(t)
  for _, task_type in ipairs({'', t.task_type}) do
    for _, status in ipairs({'', 'queued', 'processing', 'completed', 'failed', 'cancelled'}) do
      local key, belongs = index(t, status, task_type), status == '' or status == t.status
      if belongs and not holds_entry(key) then misfit('is not in the list ' .. key, 'ZADD', key, created(t), task_id) end
      if not belongs and holds_entry(key) then misfit('is in the list ' .. key .. ' though it is ' .. t.status, 'ZREM', key, task_id) end
    end
  end
  if not redis.call('ZSCORE', K.projects, t.project_id) then
    misfit('has a project that no list names', 'ZADD', K.projects, t.created_at_ms, t.project_id)
  end
  if redis.call('SISMEMBER', K.kinds, t.kind) == 0 then misfit('has a kind that no list names', 'SADD', K.kinds, t.kind) end
end

local function check_queue(t)
  local waits, placed = holds_entry(K.waiting .. lane(t)), holds_entry(queue(t))
  local later = holds_entry(K.delayed)
  if t.status == 'queued' then
    local share = redis.call('ZSCORE', K.flows .. lane(t), t.project_id)
    if waits and placed and share or later and not waits and not placed then return end
    misfit(waits and placed and 'waits in a queue without a share' or (waits or placed) and 'waits in half of its queue' or 'waits in no queue')
    if mending then
      dequeue(t)
      enqueue(t)
    end
  elseif waits or placed or later then
    misfit('waits though it is ' .. t.status)
    if mending then dequeue(t) end
  end
end

local function check_run(t)
  local runs = holds_entry(K.running .. t.kind)
  if t.status == 'processing' and not runs then
    misfit('is processing without a lease', 'ZADD', K.running .. t.kind, now, task_id) -- which is over: `tidy` gives the task back
  elseif t.status ~= 'processing' and runs then
    misfit('has a lease though it is ' .. t.status, 'ZREM', K.running .. t.kind, task_id)
  end
end

local function check_end(t)
  local over = t.status == 'completed' or t.status == 'failed' or t.status == 'cancelled'
  local noted, deadline = holds_entry(K.ended), holds_entry(K.deadlines)
  if over and not noted then misfit('has ended and would never be swept', 'ZADD', K.ended, t.ended_at_ms or now, task_id) end
  if not over and noted then misfit('would be swept though it is ' .. t.status, 'ZREM', K.ended, task_id) end
  if over and deadline then misfit('has a deadline though it has ended', 'ZREM', K.deadlines, task_id) end
  if not over and not deadline and (t.status == 'processing' or t.finish_by_ms or t.attempt == '0' and t.start_by_ms) then
    misfit('has a deadline that nothing watches')
    if mending then watch_deadline(t) end
  end
  if not over and redis.call('EXISTS', K.job .. task_id) == 0 then misfit('has no parameters any more: it fails when it is claimed') end
end

local function check_deliveries(t)
  for n = 1, t.deliveries or 0 do
    local id = task_id .. '-' .. n
    local state, job = unpack(redis.call('HMGET', K.delivery .. id, 'state', 'job'))
    job = job or id
    if state == 'pending' and not (redis.call('ZSCORE', K.deliveries, job) and redis.call('EXISTS', K.job .. job) == 1) then
      misfit('has delivery ' .. n .. ' pending in no queue')
      if mending then post(job, id, 0) end
    end
  end
end

local t = load(task_id)
if not t then
  for i = 3, #ARGV do
    if holds_entry(ARGV[i]) then misfit('has no record and is in the list ' .. ARGV[i], 'ZREM', ARGV[i], task_id) end
  end
  return found
end
for name in pairs(changed[t] or {}) do misfit('has a damaged field ' .. name) end
if t.status ~= 'queued' and t.status ~= 'processing' and t.status ~= 'completed' and t.status ~= 'failed' and t.status ~= 'cancelled' then
  changed[t] = nil
  return {'is ' .. t.status .. ', a state of another version: left as it is'}
end
check_index(t)
check_queue(t)
check_run(t)
check_end(t)
check_deliveries(t)
if not mending then changed[t] = nil end
return found
