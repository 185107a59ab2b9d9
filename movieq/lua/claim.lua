#!lua flags=allow-oom
-- Gives waiting tasks to a worker: queued -> processing, attempt + 1, a lease. Fair by project: the one with the least virtual time is next and is charged
-- the task's estimate; every eighth claim takes the oldest task of the kind, unless its project is more than a task ahead of its share.
-- args: worker_id nonce lease_ms weights rows slots host
--   nonce: random, of this call; the same nonce again gives the same tasks. weights: JSON of project -> weight, 1 where it names none. rows: JSON of batch key ->
--   most rows. slots: JSON of a list of {kinds, models, free}: the kind `deliveries` has no tasks, its idle workers are woken for the outbox.
--   host: whose worker it is; tasks whose finished files lie there come first, of whatever kind and in no slot (-1).
-- Returns a list of {task_id, run, slot, job, hash}: the run's token, the slot from 0, arq's definition (msgpack), the task's hash as field, value, ...
-- Appends `started`. A worker with a free slot left over is put on its kinds' idle sets: the next submit wakes it. Cost: O(log n) a task; where the next one's model
-- is not in the slot's memory, or it can be batched, 32 reads more.
local share, most = cjson.decode(weights), cjson.decode(rows)
local AFFINITY_MS, LOOK = 30000, 31

-- Of a project's next tasks the first whose model is in the slot's memory, unless the first of all has been passed over for half a minute.
local function favoured(waiting, resident)
  local first = redis.call('ZRANGE', waiting, 0, 0)[1]
  local t = load(first)
  if not next(resident) or resident[t.model] or t.engine == 'animatic' or now - (t.passed_ms or now) >= AFFINITY_MS then return first end
  for _, task_id in ipairs(redis.call('ZRANGE', waiting, 1, LOOK)) do
    if resident[redis.call('HGET', K.task .. task_id, 'model')] then
      if not t.passed_ms then set(t, {passed_ms = now}) end
      redis.call('HINCRBY', K.sums, 'claims passed', 1)
      return task_id
    end
  end
  return first
end

-- The next task of the kind, and the least virtual time.
local function pick(kind, resident)
  local project, least = unpack(redis.call('ZRANGE', K.flows .. kind, 0, 0, 'WITHSCORES'))
  least = tonumber(least)
  if redis.call('INCR', K.claims .. kind) % 8 == 0 then
    local oldest = redis.call('ZRANGE', K.waiting .. kind, 0, 0)[1]
    local t = load(oldest)
    local ahead = redis.call('ZSCORE', K.flows .. kind, t.project_id) - least
    if ahead <= t.estimate_ms / (share[t.project_id] or 1) then return oldest, least end -- else its project has had more than its share
  end
  return favoured(K.waiting .. kind .. ':' .. project, resident), least
end

-- Of the slot's kinds the one whose oldest task waits the longest; nil where none has any.
local function pick_kind(kinds)
  local found, since
  for _, kind in ipairs(kinds) do
    local oldest = redis.call('ZRANGE', K.waiting .. kind, 0, 0, 'WITHSCORES')
    if oldest[1] and (not since or tonumber(oldest[2]) < since) then found, since = kind, tonumber(oldest[2]) end
  end
  return found
end

-- The task, and those of its project's next that can be made with it at once.
local function batch(t)
  local found, cap = {t}, math.min(tonumber(t.batch_rows or 1), most[t.batch or ''] or math.huge)
  if cap < 2 then return found end
  for _, task_id in ipairs(redis.call('ZRANGE', queue(t), 0, LOOK)) do
    if #found >= cap then break end
    if task_id ~= t.task_id and redis.call('HGET', K.task .. task_id, 'batch') == t.batch then found[#found + 1] = load(task_id) end
  end
  return found
end

local function given(task_id, run, slot)
  local flat = {}
  for name, value in pairs(load(task_id)) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  return {task_id, run, slot, redis.call('GET', K.job .. task_id), flat}
end

local answer = {}
local last = redis.call('LRANGE', K.claimed .. worker_id, 0, -1)
if last[1] == nonce then
  for i = 2, #last do
    local task_id, run, slot = string.match(last[i], '^(%S+) (%S+) (%S+)$')
    if present(load(task_id), run) then answer[#answer + 1] = given(task_id, run, tonumber(slot)) end
  end
  return answer
end

local claimed = {nonce}

local function begin(t, slot, rows)
  local run = nonce .. '-' .. #claimed
  dequeue(t)
  set(t, {weight = share[t.project_id] or 1, rows = rows})
  charge(t, t.estimate_ms)
  if redis.call('LPUSH', K.pace .. t.kind, now) > 120 then redis.call('LTRIM', K.pace .. t.kind, 0, 99) end
  set(t, {run = run, worker_id = worker_id, attempt = t.attempt + 1, started_at_ms = now, progress = 0, current_step = 'starting'})
  unset(t, 'logged', 'remaining_ms', 'reaped', 'refunded', 'orphaned', 'passed_ms', 'gpu_share', 'gpu_at_ms', 'made_on', 'made_at_ms', 'made_ms')
  move(t, 'processing')
  redis.call('ZADD', K.running .. t.kind, now + lease_ms, t.task_id)
  redis.call('SADD', K.held .. worker_id, t.task_id)
  watch_deadline(t)
  if t.attempt ~= '1' then redis.call('PERSIST', K.log .. t.task_id) end -- a first one has no log yet
  log(t, 'started')
  claimed[#claimed + 1] = t.task_id .. ' ' .. run .. ' ' .. slot
  answer[#answer + 1] = given(t.task_id, run, slot)
end

-- Whose finished files lie on this host.
local function begin_offered()
  for _, task_id in ipairs(redis.call('ZRANGEBYSCORE', K.offered .. host, '-inf', now, 'LIMIT', 0, 20)) do
    local t = load(task_id)
    redis.call('ZREM', K.offered .. host, task_id)
    if t and t.status == 'queued' and t.made_on == host then begin(t, -1, 1) end -- else it was cancelled, or begun elsewhere meanwhile
  end
end

begin_offered()
for number, slot in ipairs(cjson.decode(slots)) do
  local kind = pick_kind(slot.kinds)
  if kind then
    local resident = {}
    for _, model in ipairs(slot.models) do resident[model] = true end
    local task_id, least = pick(kind, resident)
    if least > tonumber(redis.call('GET', K.clock .. kind) or 0) then redis.call('SET', K.clock .. kind, least) end
    local together = batch(load(task_id))
    for _, t in ipairs(together) do begin(t, number - 1, #together) end
  elseif slot.free then
    for _, each in ipairs(slot.kinds) do redis.call('SADD', K.idle .. each, worker_id) end
  end
end
redis.call('DEL', K.claimed .. worker_id)
redis.call('RPUSH', K.claimed .. worker_id, unpack(claimed))
redis.call('EXPIRE', K.claimed .. worker_id, 60)
return answer
