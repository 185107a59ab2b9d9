#!lua flags=allow-oom
-- A worker's heartbeat: renews the leases of its runs, takes back what was reaped but not begun anew, and says what it no longer has.
-- args: worker_id lease_ms heartbeat has_gpu able ...
--   heartbeat: JSON of its rows in the workers' status, passed through; has_gpu: '1' or '0'; able: JSON of {types, models} that it can run, '' for all;
--   rest: pairs of task_id and run
-- Returns {{lost task_id run, ...}, {unmentioned task_id run, ...}}: runs that were cancelled or given to others; tasks that Redis thinks it runs and it
--   did not name (the answer of their claim was lost).
-- Appends `started` to what it takes back. Cost: O(log n) a run.
redis.call('HSET', K.workers, worker_id, heartbeat)
redis.call('ZADD', K.beats, now, worker_id)
if able ~= '' then redis.call('HSET', K.able, worker_id, able) end
if has_gpu == '1' then redis.call('SET', K.gpu, '1', 'EX', 30 * 86400) end
local lost, named = {}, {}
for i = 6, #ARGV, 2 do
  local task_id, run = ARGV[i], ARGV[i + 1]
  local t = load(task_id)
  named[task_id] = true
  if holds(t, run, lease_ms) then
    redis.call('ZADD', K.running .. t.kind, now + lease_ms, task_id)
  else
    redis.call('SREM', K.held .. worker_id, task_id)
    lost[#lost + 1] = task_id
    lost[#lost + 1] = run
  end
end
local unmentioned = {}
for _, task_id in ipairs(redis.call('SMEMBERS', K.held .. worker_id)) do
  if not named[task_id] then
    local t = load(task_id)
    if t and t.status == 'processing' and t.worker_id == worker_id then
      unmentioned[#unmentioned + 1] = task_id
      unmentioned[#unmentioned + 1] = t.run
    else
      redis.call('SREM', K.held .. worker_id, task_id)
    end
  end
end
return {lost, unmentioned}
