-- What the scripts share: the loader puts this in front of every one of them, writes in the key names of contracts.py, which they call by `K`, and calls `save`
-- after it. A script checks its arguments and reads what it needs before its first write: Lua is not rolled back.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local loaded, changed = {}, {}

-- Fields of the hash: the table has them at once, the hash when the script ends, by `save`.
local function set(t, fields)
  local names = changed[t] or {}
  changed[t] = names
  for name, value in pairs(fields) do
    t[name] = tostring(value)
    names[name] = true
  end
end

local function unset(t, ...)
  local names = changed[t] or {}
  changed[t] = names
  for _, name in ipairs({...}) do
    if t[name] then
      t[name] = nil
      names[name] = true
    end
  end
end

local function numeric(text)
  local value = tonumber(text)
  return value and value > -1e13 and value < 1e13 -- so it is no NaN either, and as a time no later than the year 2286
end

local FIELDS, NUMBERS -- made when the first record is read: many calls read none

-- Completes a record from which fields are missing, so that one damaged task stops neither itself nor the others.
local function mend(t)
  -- What every record of a task holds, and what stands in for a field that was lost or damaged.
  FIELDS = FIELDS or {
    created_at_ms = now, created_us = 0, bias_ms = 0, priority = 2, estimate_ms = 60000, max_ms = 18000000, attempt = 0, tries = 0, deaths = 0,
    silences = 0, progress = 0, queued_position = 1, engine = '', model = '', shape = 'unknown', current_step = 'waiting_in_queue', warnings = '[]',
  }
  -- Numbers that a record may hold: one that is damaged counts as absent.
  NUMBERS = NUMBERS or {
    'start_by_ms', 'finish_by_ms', 'ended_at_ms', 'remaining_ms', 'weight', 'rows', 'refunded', 'made_ms', 'made_at_ms', 'gpu_ms', 'gpu_before_ms',
    'gpu_billed_ms', 'gpu_at_ms', 'gpu_share', 'passed_ms', 'logged', 'batch_rows', 'deliveries', 'retried_position', 'step', 'steps',
  }
  local mended = {}
  for name, default in pairs(FIELDS) do
    if not t[name] or type(default) == 'number' and not numeric(t[name]) then mended[name] = default end
  end
  for _, name in ipairs(NUMBERS) do
    if t[name] and not numeric(t[name]) then unset(t, name) end
  end
  if t.gpu_share and not (t.gpu_before_ms and t.gpu_at_ms and t.gpu_ms) then unset(t, 'gpu_share') end
  if t.deliveries and tonumber(t.deliveries) > 10000 then unset(t, 'deliveries') end -- loops count up to it
  for _, name in ipairs({'weight', 'rows'}) do
    if t[name] and tonumber(t[name]) <= 0 then unset(t, name) end -- it is divided by
  end
  if t.lane and t.lane ~= t.kind .. '/' .. t.task_type .. '/' .. t.model then unset(t, 'lane') end
  if t.status == 'processing' or t.reaped then
    if not t.run and not t.reaped then mended.run = 'none' end
    if not t.worker_id then mended.worker_id = 'none' end
    if not numeric(t.started_at_ms or '') then mended.started_at_ms = now end
    if t.reaped and not t.refunded then mended.refunded = 0 end
  elseif t.started_at_ms and not numeric(t.started_at_ms) then
    unset(t, 'started_at_ms')
  end
  if next(mended) then set(t, mended) end
end

-- The task's hash as a table; nil where there is none, or where it has no project, type, kind or state: nobody can say what it was.
local function load(task_id)
  if loaded[task_id] then return loaded[task_id] end
  local flat = redis.pcall('HGETALL', K.task .. task_id)
  if flat.err or #flat == 0 then return nil end -- a key of another type is no record either
  local t = {}
  for i = 1, #flat, 2 do t[flat[i]] = flat[i + 1] end
  if not (t.project_id and t.task_type and t.kind and t.status) then return nil end
  t.task_id = task_id
  mend(t)
  loaded[task_id] = t
  return t
end

-- Adds to a counter in a hash; a damaged one starts anew.
local function count(key, field, by)
  local answer = redis.pcall('HINCRBYFLOAT', key, field, by)
  if type(answer) == 'table' then redis.pcall('HSET', key, field, math.max(by, 0)) end
end

-- Notes that a list named a task without a record, or one that does not belong in it; the caller has removed the entry. The next call of `tidy` reports it.
local function dropped(where, task_id)
  count(K.sums, 'entries dropped', 1)
  redis.call('LPUSH', K.dropped, where .. ' ' .. task_id)
  redis.call('LTRIM', K.dropped, 0, 999)
  redis.call('EXPIRE', K.dropped, 86400)
end

-- Calls `act` for a task that the sorted set `key` names. Where its record is so damaged that this breaks, the entry is removed: the other tasks go on.
local function guarded(where, key, task_id, act)
  if pcall(act) then return end
  local t = loaded[task_id]
  if t then changed[t] = nil end
  redis.call('ZREM', key, task_id)
  dropped(where, task_id)
end

-- The fence: whether this run is the present one of a task in processing.
local function present(t, run)
  return t ~= nil and t.status == 'processing' and t.run == run
end

-- Writes what was changed, once for each task.
local function save()
  for t, names in pairs(changed) do
    local kept, gone = {}, {}
    for name in pairs(names) do
      if t[name] then
        kept[#kept + 1] = name
        kept[#kept + 1] = t[name]
      else
        gone[#gone + 1] = name
      end
    end
    if #kept > 0 then redis.call('HSET', K.task .. t.task_id, unpack(kept)) end
    if #gone > 0 then redis.call('HDEL', K.task .. t.task_id, unpack(gone)) end
  end
end

-- When the task was accepted, in milliseconds with their fraction: two of the same millisecond keep their order.
local function created(t)
  return t.created_at_ms + t.created_us / 1000
end

-- ── Indexes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

local function index(t, status, task_type)
  return K.index .. t.project_id .. '|' .. status .. '|' .. task_type
end

-- Puts the task under its new status; the lists of a project hold at every moment just the tasks that they say.
local function move(t, status)
  if t.status then
    redis.call('ZREM', index(t, t.status, ''), t.task_id)
    redis.call('ZREM', index(t, t.status, t.task_type), t.task_id)
    count(K.totals, t.status, -1)
  end
  redis.call('ZADD', index(t, status, ''), created(t), t.task_id)
  redis.call('ZADD', index(t, status, t.task_type), created(t), t.task_id)
  count(K.totals, status, 1)
  set(t, {status = status})
end

-- ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- RFC 3339 in UTC; the date by the days-to-civil algorithm of H. Hinnant.
local function rfc3339(ms)
  local days, rest = math.floor(ms / 86400000), ms % 86400000
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day,
    math.floor(rest / 3600000), math.floor(rest / 60000) % 60, math.floor(rest / 1000) % 60, rest % 1000)
end

local function json(value)
  if value == nil then return 'null' end
  return cjson.encode(value)
end

local function number(value)
  return value or 'null'
end

-- The JSON of an event. `extra` is a list of '"name":json' pieces; user JSON passes through as it is.
local function event(t, event_type, extra)
  local remaining = t.remaining_ms and string.format('%.1f', t.remaining_ms / 1000) or 'null'
  local parts = {
    '"task_id":' .. json(t.task_id), '"project_id":' .. json(t.project_id), '"task_type":' .. json(t.task_type), '"type":' .. json(event_type),
    '"time":"' .. rfc3339(now) .. '"',
    '"attempt":' .. t.attempt, '"status":' .. json(t.status), '"progress":' .. t.progress, '"current_step":' .. json(t.current_step),
    '"stage":' .. json(t.stage), '"step":' .. number(t.step), '"steps":' .. number(t.steps), '"estimated_remaining":' .. remaining,
  }
  for _, piece in ipairs(extra or {}) do parts[#parts + 1] = piece end
  return '{' .. table.concat(parts, ',') .. '}'
end

-- To whoever listens: `name` is a task, or project:PROJECT; `id` that of the log's entry, or '>' and the time where it is in no log, so that who has read the log
-- knows what is old.
local function publish(name, id, event_type, data)
  redis.call('PUBLISH', K.events .. name, id .. '\n' .. event_type .. '\n' .. data)
end

-- An entry of the project's log, which holds the last thousand changes of state (or a few more: whole nodes are trimmed), for a day after the last.
local function log_in_project(t, event_type, data)
  local name = 'project:' .. t.project_id
  publish(name, redis.call('XADD', K.log .. name, 'MAXLEN', '~', 1000, '*', 'type', event_type, 'data', data), event_type, data)
  redis.call('EXPIRE', K.log .. name, 86400)
end

-- An entry of the task's log, of which the last two thousand are kept, and, unless it is progress, of its project's; the same on pub/sub.
local function log(t, event_type, extra)
  local data = event(t, event_type, extra)
  local id = redis.pcall('XADD', K.log .. t.task_id, 'MAXLEN', '~', 2000, '*', 'type', event_type, 'data', data)
  if type(id) == 'table' then -- a key of another type is no log
    redis.call('DEL', K.log .. t.task_id)
    id = redis.call('XADD', K.log .. t.task_id, '*', 'type', event_type, 'data', data)
  end
  set(t, {last_event_id = id})
  publish(t.task_id, id, event_type, data)
  if event_type == 'progress' then publish('project:' .. t.project_id, '>' .. now, event_type, data) else log_in_project(t, event_type, data) end
end

-- On pub/sub alone.
local function tell(t, event_type, extra)
  local data = event(t, event_type, extra)
  publish(t.task_id, '>' .. now, event_type, data)
  publish('project:' .. t.project_id, '>' .. now, event_type, data)
end

-- ── The queue ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Wakes one idle worker of a kind. A worker that has gone hears nothing: then the next one.
local function wake(kind)
  for _ = 1, 16 do
    local worker = redis.call('SPOP', K.idle .. kind)
    if not worker or redis.call('PUBLISH', K.control .. worker, 'wake') > 0 then return end
  end
end

-- The lane that the task waits in: its kind or, once a worker that cannot run it has met it, one for its type and model alone (see claim.lua).
local function lane(t)
  return t.lane or t.kind
end

local function queue(t)
  return K.waiting .. lane(t) .. ':' .. t.project_id
end

-- Into the queue of the task's project and lane, at the place that its age and priority give it.
local function enqueue(t)
  redis.call('ZADD', queue(t), created(t) - t.bias_ms, t.task_id)
  redis.call('ZADD', K.waiting .. lane(t), created(t), t.task_id)
  count(K.priorities .. t.kind, t.priority, 1)
  if t.lane then redis.call('SADD', K.lanes .. t.kind, t.lane) end
  if not redis.call('ZSCORE', K.flows .. lane(t), t.project_id) then
    local spent = tonumber(redis.call('HGET', K.spent .. lane(t), t.project_id) or 0)
    local claimed = tonumber(redis.call('GET', K.clock .. lane(t)) or 0)
    redis.call('ZADD', K.flows .. lane(t), math.max(spent or 0, claimed or 0), t.project_id)
  end
  wake(t.kind)
end

-- Where the finished files of the task lie on a host, its workers alone may have it, for a minute from when it is due; then it waits as any other. Whether so.
local function offer(t, delay_ms)
  if not t.made_on then return false end
  redis.call('ZADD', K.offered .. t.made_on, now + delay_ms, t.task_id)
  redis.call('EXPIRE', K.offered .. t.made_on, 86400)
  redis.call('ZADD', K.delayed, now + delay_ms + 60000, t.task_id)
  return true
end

-- A project without waiting tasks leaves the flows of a lane, and its virtual time is kept; a lane for one type and model goes with its last task.
local function settle(kind, of, project_id)
  if redis.call('EXISTS', K.waiting .. of .. ':' .. project_id) == 0 then
    local time = redis.call('ZSCORE', K.flows .. of, project_id)
    if time then redis.call('HSET', K.spent .. of, project_id, time) end
    redis.call('ZREM', K.flows .. of, project_id)
  end
  if of ~= kind and redis.call('EXISTS', K.flows .. of) == 0 then redis.call('SREM', K.lanes .. kind, of) end
end

-- Out of the queue again.
local function dequeue(t)
  redis.call('ZREM', K.delayed, t.task_id)
  if redis.call('ZREM', K.waiting .. lane(t), t.task_id) == 1 then count(K.priorities .. t.kind, t.priority, -1) end
  if redis.call('ZREM', queue(t), t.task_id) == 1 then settle(t.kind, lane(t), t.project_id) end
end

-- Adds to the virtual time of the task's project: a heavier project's time runs slower; what is made at once shares the time.
local function charge(t, ms)
  ms = ms / (t.weight or 1) / (t.rows or 1)
  if redis.call('ZSCORE', K.flows .. lane(t), t.project_id) then
    redis.call('ZINCRBY', K.flows .. lane(t), ms, t.project_id)
  else
    count(K.spent .. lane(t), t.project_id, ms)
  end
end

-- How long the run has worked: not while its finished files wait for a storage that is away.
local function worked(t)
  return tonumber(t.made_ms or now - t.started_at_ms)
end

-- While the task waits: the sooner of its deadlines; start_by no more once it was started, however that run ended. While it runs: the end
-- of its longest time, or, where its files are made, of the day that it has to store them; or finish_by.
local function watch_deadline(t)
  local at
  if t.status == 'processing' then
    local run_by = t.made_at_ms and t.made_at_ms + 86400000 or t.started_at_ms + t.max_ms
    at = math.min(run_by, tonumber(t.finish_by_ms or math.huge))
  else
    at = math.min(tonumber(tonumber(t.attempt) == 0 and t.start_by_ms or math.huge), tonumber(t.finish_by_ms or math.huge))
  end
  if at < math.huge then
    redis.call('ZADD', K.deadlines, at, t.task_id)
  else
    redis.call('ZREM', K.deadlines, t.task_id)
  end
end

-- What the task had of GPUs: that of earlier runs, and what this one says that it has had, with the share of a GPU that it has from now on.
local function meter(t, ms, share)
  if not t.gpu_share then set(t, {gpu_before_ms = t.gpu_ms or 0}) end
  set(t, {gpu_ms = string.format('%.3f', t.gpu_before_ms + ms), gpu_share = share, gpu_at_ms = now})
end

-- The same at the end of a run, which may have come to say nothing for a while; it is in the sums of the project and of the installation.
local function bill(t)
  if not t.gpu_share then return end
  set(t, {gpu_ms = string.format('%.3f', t.gpu_ms + (now - t.gpu_at_ms) * t.gpu_share), gpu_at_ms = now})
  local ms = t.gpu_ms - (t.gpu_billed_ms or 0)
  if ms > 0 then
    for _, whose in ipairs({t.project_id, ''}) do count(K.gpu_ms, whose, string.format('%.3f', ms)) end
    set(t, {gpu_billed_ms = t.gpu_ms})
  end
end

-- The run is over, whatever comes next: its lease, its charge against the estimate, its GPU, what it put into storage without committing it.
local function release(t, committed)
  bill(t)
  if t.reaped ~= t.run then unset(t, 'gpu_share', 'gpu_at_ms') end -- one whose lease was over may come back, and has its GPU meanwhile
  redis.call('ZREM', K.running .. t.kind, t.task_id)
  redis.call('SREM', K.held .. t.worker_id, t.task_id)
  charge(t, worked(t) - t.estimate_ms)
  if t.prefix and not committed then
    redis.call('ZADD', K.orphans, now + 60000, t.prefix)
    set(t, {orphaned = t.prefix})
  end
  unset(t, 'prefix')
end

-- ── The way out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- A plain arq job that runs deliver(delivery_id), due after a while.
local function post(job, delivery_id, delay_ms)
  -- {t: nil, f: 'deliver', a: [id], k: {}, et: now}; the empty map is spelled out, since cmsgpack would pack it as a list
  redis.call('SET', K.job .. job,
    '\133\161t\192\161f' .. cmsgpack.pack('deliver') .. '\161a\145' .. cmsgpack.pack(delivery_id) .. '\161k\128\162et' .. cmsgpack.pack(now))
  redis.call('ZADD', K.deliveries, now + delay_ms, job)
  if delay_ms == 0 then wake('deliveries') end
end

-- The job of a delivery that waits is due now at the latest; false where there is none.
local function hasten(delivery_id)
  local job = redis.call('HGET', K.delivery .. delivery_id, 'job') or delivery_id
  if not redis.call('ZSCORE', K.deliveries, job) then return false end
  redis.call('ZADD', K.deliveries, 'XX', 'LT', now, job)
  wake('deliveries')
  return true
end

-- An entry of the outbox, with the facts frozen in it. Returns its id.
local function put_out(t, kind, url, event_type, delay_ms)
  set(t, {deliveries = (t.deliveries or 0) + 1})
  local id = t.task_id .. '-' .. t.deliveries
  local facts = {
    'kind', kind, 'type', event_type, 'status', t.status, 'url', url, 'at_ms', now, 'metadata', t.metadata or '{}', 'state', 'pending',
  }
  for _, name in ipairs({'task_id', 'project_id', 'task_type', 'result', 'error', 'error_code', 'started_at_ms', 'ended_at_ms'}) do
    if t[name] and (name ~= 'started_at_ms' or t.run) then -- of the last attempt, where the task did not end while it waited
      facts[#facts + 1] = name
      facts[#facts + 1] = t[name]
    end
  end
  redis.call('HSET', K.delivery .. id, unpack(facts))
  redis.call('EXPIRE', K.delivery .. id, 30 * 86400)
  post(id, id, delay_ms)
  return id
end

-- Tells the world: the callback, and before it the CMS, where `cms` is its address; for that the callback waits, at most half a minute. What the callback has
-- not taken yet of what the task told before is due at once: it comes first.
local function deliver(t, event_type, cms)
  local first = cms and cms ~= '' and put_out(t, 'payload', cms, event_type, 0)
  if not t.callback_url then return end
  for n = 1, t.deliveries or 0 do
    local before = redis.call('HMGET', K.delivery .. t.task_id .. '-' .. n, 'kind', 'state')
    if before[1] == 'webhook' and before[2] == 'pending' then hasten(t.task_id .. '-' .. n) end
  end
  local webhook = put_out(t, 'webhook', t.callback_url, event_type, first and 30000 or 0)
  if first then redis.call('HSET', K.delivery .. first, 'webhook', webhook) end
end

-- The task has ended: nothing waits for it and nobody runs it any more.
local function conclude(t, status, extra, cms)
  redis.call('ZADD', K.ended, now, t.task_id)
  set(t, {ended_at_ms = now})
  unset(t, 'remaining_ms')
  move(t, status)
  log(t, status, extra)
  redis.call('EXPIRE', K.log .. t.task_id, 86400)
  deliver(t, status, cms)
end

-- Ends the task, from queued or processing.
local function finish(t, status, extra, cms)
  if t.status == 'processing' then release(t, status == 'completed') else dequeue(t) end
  redis.call('ZREM', K.deadlines, t.task_id)
  conclude(t, status, extra, cms)
end

local function fail(t, message, code, retryable)
  unset(t, 'result') -- of a damaged record
  set(t, {error = message, error_code = code, retryable = retryable, ended_as = 'failed'})
  finish(t, 'failed', {'"error":' .. json(message), '"error_code":' .. json(code), '"retryable":' .. tostring(retryable)})
end

-- Its worker or its engine died with it too often: kept as a dead letter, with what is known of the last death.
local function bury(t, message)
  redis.call('ZADD', K.dead, now, t.task_id)
  fail(t, message, 'worker_lost', true)
end

-- The fence of a run's verbs: whether this run is the present one, also again: a run whose lease was over, and whose task waits since, goes on where
-- nobody began it anew and what it stored is not about to be deleted. Appends `started` then.
local function holds(t, run, lease_ms)
  if present(t, run) then return true end
  if not t or t.status ~= 'queued' or t.reaped ~= run then return false end
  if t.orphaned and tonumber(redis.call('ZSCORE', K.orphans, t.orphaned) or 0) <= now then return false end
  dequeue(t)
  charge(t, -t.refunded)
  set(t, {run = run, silences = t.silences - 1})
  if t.orphaned then
    redis.call('ZREM', K.orphans, t.orphaned)
    set(t, {prefix = t.orphaned})
  end
  unset(t, 'reaped', 'refunded', 'ended_run', 'ended_as', 'orphaned')
  move(t, 'processing')
  redis.call('ZADD', K.running .. t.kind, now + lease_ms, t.task_id)
  redis.call('SADD', K.held .. t.worker_id, t.task_id)
  watch_deadline(t)
  log(t, 'started')
  return true
end

-- Back to waiting after a run without a result: at once, or after a while.
local function put_back(t, delay_ms, message, code)
  release(t, false)
  move(t, 'queued')
  set(t, {progress = 0, current_step = 'waiting_in_queue', ended_run = t.run, ended_as = 'queued'})
  unset(t, 'stage', 'step', 'steps', 'remaining_ms', 'run')
  if offer(t, delay_ms) then -- nothing else
  elseif delay_ms > 0 then
    redis.call('ZADD', K.delayed, now + delay_ms, t.task_id)
  else
    enqueue(t)
  end
  watch_deadline(t)
  log(t, 'retrying', {'"error":' .. json(message), '"error_code":' .. json(code), '"retry_in":' .. string.format('%.1f', delay_ms / 1000)})
end
