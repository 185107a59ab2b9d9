#!lua flags=allow-oom
-- Claims waiting tasks for a worker: queued -> processing, attempt + 1, a lease. Flows share the queue fairly, and projects share a flow:
-- the flow, and in it the project, with the least virtual time is next, and both are charged the task's estimate. Every eighth claim gets
-- the oldest task of the lane, unless its flow or project is more than one task ahead of its share. A task that this worker cannot run
-- moves to the lane of its task type and model, so that it does not block the tasks behind it. An entry without a record is dropped; a task
-- whose parameters are gone fails.
-- args: worker_id nonce lease_ms weights rows slots host able
--   worker_id: of the worker
--   nonce: random; a repeated call with the same nonce gets the same tasks
--   lease_ms: length of the lease
--   weights: JSON of project -> weight; other projects have weight 1
--   rows: JSON of batch key -> the most tasks of a batch
--   slots: JSON of [{kinds, models, free}]; the kind `deliveries` has no tasks, but its idle workers are woken for the outbox
--   host: of the worker; tasks of any kind with finished files on this host come first, as slot -1
--   able: JSON of {types, models} that the worker can run; '' for all
-- Returns [{task_id, run token, slot from 0, arq's definition (msgpack), the task's hash as field, value, ...}].
-- Appends `started`. A worker that still has a free slot is added to the idle sets of its kinds, so that the next submit wakes it. The
--   answer is stored for 60 s.
-- Cost: O(log n) a task; 32 more reads if the next task's model is not loaded in the slot, or the task can be batched; at most 100 tasks a
--   call are moved or dropped.
-- include: time counters record run_fields dropped index events lanes fair_share queue deadlines fence runs failure
local weight_of, rows_of = cjson.decode(weights), cjson.decode(rows)
local AFFINITY_MS, LOOK = 30000, 31
local moves_left = 100

local types, known
if able ~= '' then
  types, known = {}, {}
  local names = cjson.decode(able)
  for _, name in ipairs(names.types) do types[name] = true end
  for _, name in ipairs(names.models) do known[name] = true end
end

local function can_run(task_type, model)
  return not types or types[task_type] and known[model]
end

-- Returns a place in which tasks wait, with the fields of a task there.
local function place(kind, of, flow, project_id)
  return {kind = kind, lane = of ~= kind and of or nil, flow = flow, project_id = project_id}
end

-- Returns the project or flow of the scope with the least virtual time, and that time; nil if there is none.
local function least(of)
  return unpack(redis.call('ZRANGE', K.virtual_times .. of, 0, 0, 'WITHSCORES'))
end

-- Returns the place whose turn it is in this lane; nil if no flow has a virtual time there. Its field `least` has the least virtual times
-- by scope.
local function next_place(kind, of)
  local member, virtual = least(of)
  if not member then return nil end
  local at = place(kind, of, nil, member)
  at.least = {[of] = virtual}
  if string.sub(member, 1, 1) == '@' then
    at.flow = string.sub(member, 2)
    local project, within = least(scope(at))
    at.project_id = project or '' -- '' has no tasks
    at.least[scope(at)] = within
  end
  return at
end

-- Returns the task if it waits here; else removes its entry and returns nil. A task that waits elsewhere in the lane, because an older
-- version does not know flows, is put where it belongs.
local function waiting_task(at, task_id)
  local t = load(task_id)
  local waits = t and t.status == 'queued'
  if waits and queue(t) == queue(at) then return t end
  moves_left = moves_left - 1
  local elsewhere = waits and lane(t) == lane(at) and redis.call('ZSCORE', K.waiting .. lane(t), task_id)
  local removed = redis.call('ZREM', queue(at), task_id)
  if elsewhere then
    dequeue(t)
    enqueue(t)
  elseif redis.call('ZREM', K.waiting .. lane(at), task_id) + removed > 0 then
    note_dropped('waiting', task_id)
  end
  leave_share(at)
end

-- Returns whether this worker can run the task; if not, moves it to the lane of its task type and model.
local function runnable_or_moved(t)
  if can_run(t.task_type, t.model) then return true end
  moves_left = moves_left - 1
  dequeue(t)
  set(t, {lane = t.kind .. '/' .. t.task_type .. '/' .. t.model})
  enqueue(t)
  return false
end

-- Returns the first of a project's next tasks whose model is loaded in the slot; `first` if there is none, or if it has been passed over
-- for 30 s.
local function by_affinity(first, is_loaded)
  if not next(is_loaded) or is_loaded[first.model] or first.engine == 'animatic' or now - (first.passed_ms or now) >= AFFINITY_MS then return first end
  for _, task_id in ipairs(redis.call('ZRANGE', queue(first), 1, LOOK)) do
    local model = redis.pcall('HGET', K.task .. task_id, 'model')
    if model and is_loaded[model] then
      local t = load(task_id)
      if t and t.status == 'queued' and can_run(t.task_type, t.model) then
        if not first.passed_ms then set(first, {passed_ms = now}) end
        count(K.sums, 'claims passed', 1)
        return t
      end
    end
  end
  return first
end

-- Queues the oldest task of a lane again, because the virtual time of its project or flow is missing there.
local function enqueue_oldest(kind, of)
  local oldest = redis.call('ZRANGE', K.waiting .. of, 0, 0)[1]
  local t = load(oldest)
  moves_left = moves_left - 1
  if t and t.status == 'queued' and lane(t) == of then
    redis.call('ZREM', K.waiting .. of, oldest)
    count(K.priorities .. kind, t.priority, -1)
    enqueue(t)
  else
    redis.call('ZREM', K.waiting .. of, oldest)
    note_dropped('waiting', oldest)
  end
end

-- Returns whether the project and flow of this place are at most one task ahead of their shares; nil if one has no virtual time.
local function in_share(at, estimate_ms)
  local fair = true
  for _, share in ipairs(shares(at)) do
    local of, member = unpack(share)
    local virtual, _, first = redis.call('ZSCORE', K.virtual_times .. of, member), least(of)
    if not virtual then return nil end
    if virtual - first > estimate_ms / (member == at.project_id and weight_of[member] or 1) then fair = false end
  end
  return fair
end

-- Returns the next task of the lane that this worker can run, and the place whose turn it was; nil if there is no such task.
local function pick(kind, of, is_loaded)
  local turn = redis.call('INCR', K.claims .. of)
  while moves_left > 0 and redis.call('EXISTS', K.waiting .. of) == 1 do
    local at, t = next_place(kind, of)
    if at and turn % 8 == 0 then
      local oldest = redis.call('ZRANGE', K.waiting .. of, 0, 0)[1]
      local found = load(oldest)
      local old = found and place(kind, of, found.flow, found.project_id)
      local fair = old and in_share(old, found.estimate_ms)
      if fair == nil then
        at = nil
      elseif fair then
        t = waiting_task(old, oldest)
      end
    end
    if not at then
      enqueue_oldest(kind, of)
    else
      if not t then
        local first = redis.call('ZRANGE', queue(at), 0, 0)[1]
        if first then
          t = waiting_task(at, first)
        else
          moves_left = moves_left - 1
          leave_share(at)
        end
        if t and can_run(t.task_type, t.model) then t = by_affinity(t, is_loaded) end
      end
      if t and runnable_or_moved(t) then return t, at end
    end
  end
end

-- Returns the lane of these kinds whose oldest task has waited longest, and its kind; nil if there is none. Skips lanes that this worker
-- cannot run.
local function pick_lane(kinds, passed)
  local found, found_kind, since
  for _, kind in ipairs(kinds) do
    local lanes = redis.call('SMEMBERS', K.lanes .. kind)
    lanes[#lanes + 1] = kind
    for _, of in ipairs(lanes) do
      local task_type, model = string.match(of, '^[^/]*/([^/]*)/(.*)$')
      if not passed[of] and (of == kind or can_run(task_type, model)) then
        local oldest = redis.call('ZRANGE', K.waiting .. of, 0, 0, 'WITHSCORES')
        if oldest[1] and (not since or tonumber(oldest[2]) < since) then found, found_kind, since = of, kind, tonumber(oldest[2]) end
      end
    end
  end
  return found, found_kind
end

-- Returns the next task for a slot, and the place whose turn it was; nil if there is no task.
local function next_task(slot)
  local is_loaded, passed = {}, {}
  for _, model in ipairs(slot.models) do is_loaded[model] = true end
  while true do
    local of, kind = pick_lane(slot.kinds, passed)
    if not of then return nil end
    local t, at = pick(kind, of, is_loaded)
    if t then return t, at end
    passed[of] = true
  end
end

-- Returns the task, and those of its project's next tasks that can be rendered in the same batch.
local function batch(t)
  local found, cap = {t}, math.min(tonumber(t.batch_rows or 1), rows_of[t.batch or ''] or math.huge)
  if cap < 2 then return found end
  for _, task_id in ipairs(redis.call('ZRANGE', queue(t), 0, LOOK)) do
    if #found >= cap then break end
    if task_id ~= t.task_id and redis.pcall('HGET', K.task .. task_id, 'batch') == t.batch then
      local other = load(task_id)
      if other and other.status == 'queued' and can_run(other.task_type, other.model) then found[#found + 1] = other end
    end
  end
  return found
end

local function answer_of(t, job, slot)
  local flat = {}
  for name, value in pairs(t) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  return {t.task_id, t.run, slot, job, flat}
end

local answer = {}
local last = redis.call('LRANGE', K.claimed .. worker_id, 0, -1)
if last[1] == nonce then
  for i = 2, #last do
    local task_id, run, slot = string.match(last[i], '^(%S+) (%S+) (%S+)$')
    local t, job = load(task_id), redis.call('GET', K.job .. task_id)
    if job and is_current(t, run) then answer[#answer + 1] = answer_of(t, job, tonumber(slot)) end
  end
  return answer
end

local claimed = {nonce}

local function begin(t, slot, batch_size)
  local job = redis.call('GET', K.job .. t.task_id)
  if not job then
    fail(t, 'the parameters of this task are no longer in Redis: submit it again', 'internal', false)
    return
  end
  local run = nonce .. '-' .. #claimed
  dequeue(t)
  set(t, {weight = weight_of[t.project_id] or 1, rows = batch_size})
  charge(t, t.estimate_ms)
  if redis.call('LPUSH', K.claim_times .. t.kind, now) > 120 then redis.call('LTRIM', K.claim_times .. t.kind, 0, 99) end
  forget_runs(t)
  set(t, {run = run, worker_id = worker_id, attempt = t.attempt + 1, started_at_ms = now, progress = 0, current_step = 'starting'})
  move(t, 'processing')
  lease(t, lease_ms)
  watch_deadline(t)
  if t.attempt ~= '1' then redis.call('PERSIST', K.log .. t.task_id) end -- a first run has no log yet
  log(t, 'started')
  claimed[#claimed + 1] = t.task_id .. ' ' .. run .. ' ' .. slot
  answer[#answer + 1] = answer_of(t, job, slot)
end

-- Starts runs of tasks with finished files on this host.
local function begin_offered()
  for _, task_id in ipairs(redis.call('ZRANGEBYSCORE', K.offered .. host, '-inf', now, 'LIMIT', 0, 20)) do
    local t = load(task_id)
    redis.call('ZREM', K.offered .. host, task_id)
    -- else it has been cancelled or claimed, or this worker cannot run it
    if t and t.status == 'queued' and t.made_on == host and can_run(t.task_type, t.model) then
      guarded('offered', K.offered .. host, task_id, function() begin(t, -1, 1) end)
    end
  end
end

begin_offered()
for number, slot in ipairs(cjson.decode(slots)) do
  local t, at = next_task(slot)
  if t then
    for of, virtual in pairs(at.least) do -- what joins later joins at these virtual times
      if tonumber(virtual) > tonumber(redis.call('GET', K.claimed_virtual_time .. of) or 0) then
        redis.call('SET', K.claimed_virtual_time .. of, virtual)
      end
    end
    local together = batch(t)
    for _, each in ipairs(together) do begin(each, number - 1, #together) end
  elseif slot.free then
    for _, each in ipairs(slot.kinds) do redis.call('SADD', K.idle .. each, worker_id) end
  end
end
if moves_left <= 0 then redis.call('PUBLISH', K.control .. worker_id, 'wake') end -- more tasks have to be moved
redis.call('DEL', K.claimed .. worker_id)
redis.call('RPUSH', K.claimed .. worker_id, unpack(claimed))
redis.call('EXPIRE', K.claimed .. worker_id, 60)
return answer
