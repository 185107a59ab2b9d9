#!lua flags=allow-oom
-- Compares a task with the lists that contain it, and repairs inconsistencies.
-- args: task_id apply ...
--   task_id: of the task, or of entries without a record
--   apply: '1' to repair, '' only to check
--   ...: keys of sorted sets in which the task was found
-- Returns the inconsistencies, as clauses about the task; {} if there are none.
-- Appends nothing; a pending delivery that is in no queue becomes due at once.
-- Cost: O(log n), O(deliveries of the task).
-- include: time record index lanes fair_share queue deadlines delivery_jobs
local found = {}
local mending = apply == '1'

-- Adds an inconsistency to the answer and, if `apply` is set, repairs it with the Redis command in `...`.
local function note(text, ...)
  found[#found + 1] = text
  if mending and select('#', ...) > 0 then redis.call(...) end
end

local function listed(key)
  return redis.call('ZSCORE', key, task_id)
end

local function check_index(t)
  for _, task_type in ipairs({'', t.task_type}) do
    for _, status in ipairs({'', 'queued', 'processing', 'completed', 'failed', 'cancelled'}) do
      local key, belongs = index(t, status, task_type), status == '' or status == t.status
      if belongs and not listed(key) then note('is not in the list ' .. key, 'ZADD', key, created(t), task_id) end
      if not belongs and listed(key) then note('is in the list ' .. key .. ' although it is ' .. t.status, 'ZREM', key, task_id) end
    end
  end
  if not redis.call('ZSCORE', K.projects, t.project_id) then
    note('has a project that is not in the list of projects', 'ZADD', K.projects, t.created_at_ms, t.project_id)
  end
  if redis.call('SISMEMBER', K.kinds, t.kind) == 0 then note('has a kind that is not in the list of kinds', 'SADD', K.kinds, t.kind) end
end

-- Returns whether the task's project and flow have a virtual time.
local function has_shares(t)
  for _, share in ipairs(shares(t)) do
    if not redis.call('ZSCORE', K.virtual_times .. share[1], share[2]) then return false end
  end
  return true
end

local function check_queue(t)
  for i = 3, #ARGV do
    local key = ARGV[i]
    if string.sub(key, 1, #K.waiting) == K.waiting and key ~= K.waiting .. lane(t) and key ~= queue(t) and listed(key) then
      note('is in the list ' .. key .. ', where it does not belong', 'ZREM', key, task_id)
    end
  end
  local waits, placed = listed(K.waiting .. lane(t)), listed(queue(t))
  local later = listed(K.delayed)
  if t.status == 'queued' then
    local named = not t.lane or redis.call('SISMEMBER', K.lanes .. t.kind, t.lane) == 1
    if waits and placed and has_shares(t) and named or later and not waits and not placed then return end
    note(not named and waits and 'waits in a lane that no list names' or waits and placed and 'waits in a queue whose project or flow has no share'
      or (waits or placed) and 'is in only one of the two lists of its queue' or 'is queued and in no queue')
    if mending then
      dequeue(t)
      enqueue(t)
    end
  elseif waits or placed or later then
    note('is in a queue although it is ' .. t.status)
    if mending then dequeue(t) end
  end
end

local function check_run(t)
  local runs = listed(K.running .. t.kind)
  if t.status == 'processing' and not runs then
    note('is processing without a lease', 'ZADD', K.running .. t.kind, now, task_id) -- already expired: `tidy` requeues the task
  elseif t.status ~= 'processing' and runs then
    note('has a lease although it is ' .. t.status, 'ZREM', K.running .. t.kind, task_id)
  end
end

local function check_end(t)
  local over = t.status == 'completed' or t.status == 'failed' or t.status == 'cancelled'
  local noted, deadline = listed(K.ended), listed(K.deadlines)
  if over and not noted then note('has ended and would never be deleted', 'ZADD', K.ended, t.ended_at_ms or now, task_id) end
  if not over and noted then note('would be deleted although it is ' .. t.status, 'ZREM', K.ended, task_id) end
  if over and deadline then note('has a deadline although it has ended', 'ZREM', K.deadlines, task_id) end
  if not over and not deadline and (t.status == 'processing' or t.finish_by_ms or t.attempt == '0' and t.start_by_ms) then
    note('has a deadline that nothing watches')
    if mending then watch_deadline(t) end
  end
  if not over and redis.call('EXISTS', K.job .. task_id) == 0 then note('has lost its parameters: it fails when it is claimed') end
end

local function check_deliveries(t)
  for n = 1, t.deliveries or 0 do
    local id = task_id .. '-' .. n
    local state, job = unpack(redis.call('HMGET', K.delivery .. id, 'state', 'job'))
    job = job or id
    if state == 'pending' and not (redis.call('ZSCORE', K.deliveries, job) and redis.call('EXISTS', K.job .. job) == 1) then
      note('has pending delivery ' .. n .. ' in no queue')
      if mending then schedule(job, id, 0) end
    end
  end
end

local t = load(task_id)
if not t then
  for i = 3, #ARGV do
    if listed(ARGV[i]) then note('has no record but is in the list ' .. ARGV[i], 'ZREM', ARGV[i], task_id) end
  end
  return found
end
for name in pairs(changed[t] or {}) do note('has a missing or damaged field ' .. name) end
if t.status ~= 'queued' and t.status ~= 'processing' and t.status ~= 'completed' and t.status ~= 'failed' and t.status ~= 'cancelled' then
  discard(t)
  return {'is ' .. t.status .. ', a state that this version does not know: left as it is'}
end
check_index(t)
check_queue(t)
check_run(t)
check_end(t)
check_deliveries(t)
if not mending then discard(t) end
return found
