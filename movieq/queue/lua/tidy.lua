#!lua flags=allow-oom
-- Handles what is due: requeues tasks whose lease has expired, queues delayed tasks, fails tasks past their deadline, and removes dead
-- workers.
-- args: batch silences_limit outage_ms quiet_ms forget_ms ...
--   batch: the most leases (of each kind), delayed tasks, deadlines and workers in one call
--   silences_limit: the number of expired leases that makes a task a dead letter
--   outage_ms: if the last call is longer ago than this, or the time of Redis went back, no lease expires for quiet_ms
--   quiet_ms: see outage_ms
--   forget_ms: a worker without a heartbeat for this long is removed
--   ...: kinds to check, in addition to those that have had tasks
-- Returns {expired leases, delayed tasks that were due, tasks past their deadline, {"LIST TASK", ...}}: the last are entries that scripts
--   have dropped since the last call.
-- Every worker calls it with each renewal, and every API process once a second.
-- Appends `retrying`; or appends `failed` and adds deliveries to the outbox.
-- Cost: O(log n) a task, O(kinds) without any.
-- include: time record dropped queue runs failure requeue
local last_call = tonumber(redis.call('GET', K.last_tidy) or '') or now
redis.call('SET', K.last_tidy, now)
if now - last_call > tonumber(outage_ms) or now < last_call then redis.call('SET', K.leases_paused, now + quiet_ms, 'PX', quiet_ms) end

local due = redis.call('ZRANGEBYSCORE', K.delayed, '-inf', now, 'LIMIT', 0, batch)
for _, task_id in ipairs(due) do
  guarded('delayed', K.delayed, task_id, function()
    redis.call('ZREM', K.delayed, task_id)
    local t = load(task_id)
    if t and t.status == 'queued' then enqueue(t) else note_dropped('delayed', task_id) end
  end)
end

-- Fails a task whose deadline has passed.
local function fail_late(task_id)
  local t = load(task_id)
  local running = t and t.status == 'processing' and t.run
  if not t or not running and t.status ~= 'queued' then
    redis.call('ZREM', K.deadlines, task_id)
    note_dropped('deadlines', task_id)
  elseif running then
    set(t, {ended_run = t.run})
    local finish_by = t.finish_by_ms and now >= tonumber(t.finish_by_ms)
    if t.made_at_ms and not finish_by then
      fail(t, 'its files were made, but could not be stored for a day; when the storage is mended, retry the task', 'storage', true)
    else
      fail(t, finish_by and 'not finished by its deadline' or 'ran for longer than the ' .. t.max_ms / 1000 .. ' s that its type may', 'deadline_exceeded', false)
    end
    redis.call('PUBLISH', K.control .. t.worker_id, 'cancel ' .. task_id .. ' ' .. running)
  else
    fail(t, t.attempt == '0' and 'not started by its deadline' or 'not finished by its deadline', 'deadline_exceeded', false)
  end
end

local past = redis.call('ZRANGEBYSCORE', K.deadlines, '-inf', now, 'LIMIT', 0, batch)
for _, task_id in ipairs(past) do
  guarded('deadlines', K.deadlines, task_id, function() fail_late(task_id) end)
end

-- Requeues a task whose lease has expired; if that happened too often, fails it as a dead letter.
local function expire_lease(t)
  local silences = t.silences + 1
  set(t, {silences = silences})
  if silences >= tonumber(silences_limit) then
    set(t, {ended_run = t.run})
    if t.stage then set(t, {dead_stage = t.stage}) end
    fail_as_dead_letter(t, 'its worker fell silent ' .. silences .. ' times')
  else
    set(t, {reaped = t.run, refunded = worked(t) - t.estimate_ms})
    requeue(t, silences == 1 and 0 or silences == 2 and 10000 or 30000, 'its worker fell silent', 'worker_lost')
  end
end

local expired = 0
if not redis.call('GET', K.leases_paused) then
  local kinds = {}
  for i = 6, #ARGV do kinds[ARGV[i]] = true end
  for _, kind in ipairs(redis.call('SMEMBERS', K.kinds)) do kinds[kind] = true end
  for kind in pairs(kinds) do
    for _, task_id in ipairs(redis.call('ZRANGEBYSCORE', K.running .. kind, '-inf', now, 'LIMIT', 0, batch)) do
      guarded('running', K.running .. kind, task_id, function()
        local t = load(task_id)
        if t and t.status == 'processing' and t.kind == kind then
          expired = expired + 1
          expire_lease(t)
        else
          redis.call('ZREM', K.running .. kind, task_id)
          note_dropped('running', task_id)
        end
      end)
    end
  end
end

for _, worker_id in ipairs(redis.call('ZRANGEBYSCORE', K.heartbeat_times, '-inf', now - forget_ms, 'LIMIT', 0, batch)) do
  redis.call('ZREM', K.heartbeat_times, worker_id)
  redis.call('HDEL', K.workers, worker_id)
  redis.call('HDEL', K.abilities, worker_id)
  redis.call('DEL', K.worker_tasks .. worker_id) -- its leases expired long ago, so only tasks without a record can be left
end

local noted, logged = unpack(redis.call('HMGET', K.sums, 'entries dropped', 'entries dropped, logged'))
local unlogged = (tonumber(noted or '') or 0) - (tonumber(logged or '') or 0)
if unlogged > 0 then redis.call('HSET', K.sums, 'entries dropped, logged', noted) end
return {expired, #due, #past, unlogged > 0 and redis.call('LRANGE', K.dropped, 0, math.min(unlogged, 100) - 1) or {}}
