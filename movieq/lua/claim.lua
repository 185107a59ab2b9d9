#!lua flags=allow-oom
-- Gives waiting tasks to a worker: queued -> processing, attempt + 1, a lease. Fair by project: the one with the least virtual time is next and is charged
-- the task's estimate; every eighth claim takes the oldest task of the kind, unless its project is more than a task ahead of its share.
-- args: worker_id nonce lease_ms weights host ...
--   nonce: random, of this call; the same nonce again gives the same tasks. rest: pairs of kind and free slots; the kind `deliveries` has no tasks, its
--   idle workers are woken for the outbox. weights: JSON of project -> weight, 1 where it names none. host: whose worker it is; tasks whose finished files
--   lie there come first, of whatever kind and beside the slots
-- Returns a list of {task_id, run, job, hash}: the run's token, arq's definition (msgpack), the task's hash as field, value, ...
-- Appends `started`. A worker with slots left over is put on its kinds' idle sets: the next submit wakes it. Cost: O(log n) a task.
local share = cjson.decode(weights)

-- The next task of the kind, and the least virtual time.
local function pick(kind)
  local project, least = unpack(redis.call('ZRANGE', K.flows .. kind, 0, 0, 'WITHSCORES'))
  if not project then return nil end
  least = tonumber(least)
  if redis.call('INCR', K.claims .. kind) % 8 == 0 then
    local oldest = redis.call('ZRANGE', K.waiting .. kind, 0, 0)[1]
    local t = load(oldest)
    local ahead = redis.call('ZSCORE', K.flows .. kind, t.project_id) - least
    if ahead <= t.estimate_ms / (share[t.project_id] or 1) then return oldest, least end -- else its project has had more than its share
  end
  return redis.call('ZRANGE', K.waiting .. kind .. ':' .. project, 0, 0)[1], least
end

local function given(task_id, run)
  local flat = {}
  for name, value in pairs(load(task_id)) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  return {task_id, run, redis.call('GET', K.job .. task_id), flat}
end

local answer = {}
local last = redis.call('LRANGE', K.claimed .. worker_id, 0, -1)
if last[1] == nonce then
  for i = 2, #last do
    local task_id, run = string.match(last[i], '^(%S+) (%S+)$')
    if present(load(task_id), run) then answer[#answer + 1] = given(task_id, run) end
  end
  return answer
end

local claimed = {nonce}

local function begin(t)
  local run = nonce .. '-' .. #claimed
  dequeue(t)
  set(t, {weight = share[t.project_id] or 1})
  charge(t, t.estimate_ms)
  if redis.call('LPUSH', K.pace .. t.kind, now) > 120 then redis.call('LTRIM', K.pace .. t.kind, 0, 99) end
  set(t, {run = run, worker_id = worker_id, attempt = t.attempt + 1, started_at_ms = now, progress = 0, current_step = 'starting'})
  unset(t, 'logged', 'remaining_ms', 'reaped', 'refunded', 'orphaned', 'made_on', 'made_at_ms', 'made_ms')
  move(t, 'processing')
  redis.call('ZADD', K.running .. t.kind, now + lease_ms, t.task_id)
  redis.call('SADD', K.held .. worker_id, t.task_id)
  watch_deadline(t)
  if t.attempt ~= '1' then redis.call('PERSIST', K.log .. t.task_id) end -- a first one has no log yet
  log(t, 'started')
  claimed[#claimed + 1] = t.task_id .. ' ' .. run
  answer[#answer + 1] = given(t.task_id, run)
end

-- Whose finished files lie on this host.
local function begin_offered()
  for _, task_id in ipairs(redis.call('ZRANGEBYSCORE', K.offered .. host, '-inf', now, 'LIMIT', 0, 20)) do
    local t = load(task_id)
    redis.call('ZREM', K.offered .. host, task_id)
    if t and t.status == 'queued' and t.made_on == host then begin(t) end -- else it was cancelled, or begun elsewhere meanwhile
  end
end

begin_offered()
for i = 6, #ARGV, 2 do
  local kind, free = ARGV[i], tonumber(ARGV[i + 1])
  while free > 0 do
    local task_id, least = pick(kind)
    if not task_id then break end
    if least > tonumber(redis.call('GET', K.clock .. kind) or 0) then redis.call('SET', K.clock .. kind, least) end
    begin(load(task_id))
    free = free - 1
  end
  if free > 0 then redis.call('SADD', K.idle .. kind, worker_id) end
end
redis.call('DEL', K.claimed .. worker_id)
redis.call('RPUSH', K.claimed .. worker_id, unpack(claimed))
redis.call('EXPIRE', K.claimed .. worker_id, 60)
return answer
