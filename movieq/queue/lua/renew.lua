#!lua flags=allow-oom
-- Stores a worker's heartbeat and renews the leases of its runs. A run whose lease has expired resumes if its task is still waiting.
-- args: worker_id lease_ms heartbeat gpu_bytes able ...
--   worker_id: of the worker
--   lease_ms: length of the lease
--   heartbeat: JSON of the worker's rows in GET /workers/status, stored unchanged
--   gpu_bytes: memory of its largest GPU; 0 if it has none
--   able: JSON of {types, models} that the worker can run; '' for all
--   ...: pairs of task_id and run token
-- Returns {{task_id, run, ...}, {task_id, run, ...}}: first the runs that are lost, because the task was cancelled, has ended or belongs to
--   another run; then the runs that belong to this worker although it did not name them, because the answer to its claim was lost.
-- Appends `started` for a run that resumes. The memory of the largest GPU is kept for 30 days after it was last seen.
-- Cost: O(log n) a run.
-- include: time record resume
redis.call('HSET', K.workers, worker_id, heartbeat)
redis.call('ZADD', K.heartbeat_times, now, worker_id)
if able ~= '' then redis.call('HSET', K.abilities, worker_id, able) end
gpu_bytes = tonumber(gpu_bytes)
if gpu_bytes > 0 and gpu_bytes >= (tonumber(redis.call('GET', K.gpu)) or 0) then redis.call('SET', K.gpu, gpu_bytes, 'EX', 30 * 86400) end
local lost, named = {}, {}
for i = 6, #ARGV, 2 do
  local task_id, run = ARGV[i], ARGV[i + 1]
  local t = load(task_id)
  named[task_id] = true
  if holds(t, run, lease_ms) then
    redis.call('ZADD', K.running .. t.kind, now + lease_ms, task_id)
  else
    redis.call('SREM', K.worker_tasks .. worker_id, task_id)
    lost[#lost + 1] = task_id
    lost[#lost + 1] = run
  end
end
local unmentioned = {}
for _, task_id in ipairs(redis.call('SMEMBERS', K.worker_tasks .. worker_id)) do
  if not named[task_id] then
    local t = load(task_id)
    if t and t.status == 'processing' and t.worker_id == worker_id then
      unmentioned[#unmentioned + 1] = task_id
      unmentioned[#unmentioned + 1] = t.run
    else
      redis.call('SREM', K.worker_tasks .. worker_id, task_id)
    end
  end
end
return {lost, unmentioned}
