#!lua
-- Submits a task: none -> queued, or -> completed at once if the stored result of an identical task is reused. Redis refuses it if its
-- memory is full.
-- args: task_id project_id task_type kind engine model shape flow priority bias_ms kwargs metadata callback_url estimate_ms max_ms batch batch_rows start_by_ms finish_by_ms warnings idempotency body_hash max_queued max_queued_all max_bytes fingerprint reused reused_result reused_prefix reuse_within_ms reused_cms
--   task_id, project_id, task_type, kind, engine, model, shape: of the task
--   flow: hexadecimal digits that stand for the caller's key, if that may use all projects; '' for the project's own flow
--   priority: 1 to 3
--   bias_ms: by how much the priority moves the task ahead in its project's queue
--   kwargs: msgpack map, the keyword arguments of the arq job
--   metadata: JSON, stored unchanged
--   callback_url: '' for none
--   estimate_ms: used until the durations of five tasks of this shape are known
--   max_ms: time limit of a run
--   batch: key of tasks that can be rendered in one batch, at most batch_rows of them; '' for none
--   batch_rows: see batch
--   start_by_ms, finish_by_ms: deadlines, ms since 1970; '' for none
--   warnings: JSON, stored unchanged
--   idempotency: hash of caller, project and key; '' for none
--   body_hash: of the bytes of the body
--   max_queued, max_queued_all: limits of queued tasks of the project, and of all projects; 0 for none
--   max_bytes: limit of the bytes of the project's task records; 0 for none
--   fingerprint: hash of everything that determines the result; '' for none
--   reused: completed task whose stored result is reused; '' for none
--   reused_result: JSON of that StoredResult
--   reused_prefix: storage prefix of its files
--   reuse_within_ms: highest age of the files, since older files are about to be swept; '' for any age
--   reused_cms: address of the CMS collection that gets the reused result; '' for none
-- Returns {'ok' or 'again' or 'replayed', task_id, created_at_ms, queue_position, estimate_ms, warnings}: 'again' for the same task_id,
--   'replayed' for the same idempotency key and body; {'mismatch'} for that key with another body; {'full' or 'full_all', queued tasks, ms
--   until a place is free} at a limit; {'quota', bytes} if the records of the project would take more than max_bytes.
-- Appends `queued` to the project's log only: the task's log starts with `started`, since each stream takes 4 KB. For a reused result, also
--   appends `started` and `completed`, adds deliveries to the outbox, and counts the age of its files from now. The idempotency key expires
--   in 24 h.
-- Cost: O(log n).
-- include: time record record_bytes index lanes queue deadlines events conclude
local function receipt(code, t)
  return {code, t.task_id, tonumber(t.created_at_ms), tonumber(t.queued_position), tonumber(t.estimate_ms), t.warnings}
end

-- Returns the average time between claims of the kind over the last hundred (ms); half a minute if there are too few.
local function claim_interval(of)
  local claims = redis.call('LRANGE', K.claim_times .. of, 0, 99)
  return #claims < 2 and 30000 or math.ceil((now - claims[#claims]) / #claims)
end

local known = load(task_id)
if known then return receipt('again', known) end
if idempotency ~= '' then
  local first = redis.call('GET', K.idempotency .. idempotency)
  if first then
    local hash, id = string.match(first, '^(%S+) (%S+)$')
    if hash ~= body_hash then return {'mismatch'} end
    local t = load(id)
    if t then return receipt('replayed', t) end
  end
end
-- A stored result is reused unless its task has been swept or its files are about to be.
local earlier = reused ~= '' and load(reused)
local stored = earlier and earlier.status == 'completed' and earlier.project_id == project_id and redis.call('ZSCORE', K.media, reused_prefix)
local hit = stored and (reuse_within_ms == '' or now - stored < tonumber(reuse_within_ms))

local t = {task_id = task_id, project_id = project_id, task_type = task_type, kind = kind}
if not hit and tonumber(max_queued) > 0 then
  local waiting = redis.call('ZCARD', index(t, 'queued', ''))
  if waiting >= tonumber(max_queued) then return {'full', waiting, claim_interval(kind)} end
end
if not hit and tonumber(max_queued_all) > 0 then
  local waiting = tonumber(redis.call('HGET', K.totals, 'queued') or 0)
  if waiting >= tonumber(max_queued_all) then return {'full_all', waiting, claim_interval(kind)} end
end

local job = '\133\161t\192\161f' .. cmsgpack.pack(task_type) .. '\161a\144\161k' .. kwargs .. '\162et' .. cmsgpack.pack(now)
local bytes = OVERHEAD.task + #job + #metadata + (hit and #reused_result or 0) + #callback_url + #warnings
if tonumber(max_bytes) > 0 then
  local taken = tonumber(redis.call('HGET', K.record_bytes, project_id) or 0) or 0
  if taken + bytes > tonumber(max_bytes) then return {'quota', math.floor(taken)} end
end

-- The estimate is the median of the latest durations of this shape, once there are five.
local past = redis.call('LRANGE', K.durations .. shape, 0, 20)
if #past >= 5 then
  for i, ms in ipairs(past) do past[i] = tonumber(ms) or 0 end
  table.sort(past)
  estimate_ms = past[math.ceil(#past / 2)]
end

local fields = {
  task_id = task_id, project_id = project_id, task_type = task_type, kind = kind, engine = engine, model = model, shape = shape,
  priority = priority, bias_ms = bias_ms, created_at_ms = now, created_us = micros % 1000, estimate_ms = estimate_ms, max_ms = max_ms,
  warnings = warnings, attempt = 0, tries = 0, deaths = 0, silences = 0, progress = 0, current_step = 'waiting_in_queue',
}
if flow ~= '' then fields.flow = flow end
if metadata ~= '{}' then fields.metadata = metadata end
if batch ~= '' then
  fields.batch = batch
  fields.batch_rows = batch_rows
end
if callback_url ~= '' then fields.callback_url = callback_url end
if start_by_ms ~= '' then fields.start_by_ms = start_by_ms end
if finish_by_ms ~= '' then fields.finish_by_ms = finish_by_ms end
if fingerprint ~= '' then fields.fingerprint = fingerprint end
set(t, fields)
count_bytes(t, bytes)
redis.call('SET', K.job .. task_id, job)
redis.call('ZADD', K.projects, 'NX', now, project_id)
redis.call('SADD', K.kinds, kind)
redis.call('ZADD', index(t, '', ''), created(t), task_id)
redis.call('ZADD', index(t, '', task_type), created(t), task_id)
move(t, 'queued')
if hit then
  set(t, {queued_position = 1, estimate_ms = 0})
else
  enqueue(t)
  watch_deadline(t)
  -- Exact while only one project has waiting tasks; otherwise an estimate in which every flow has one turn for each turn of this one, and
  -- every project of this flow one turn for each turn of this one.
  local ahead = redis.call('ZRANK', queue(t), task_id)
  local others = redis.call('ZCARD', K.waiting .. kind) - redis.call('ZCARD', queue(t))
  local turns = redis.call('ZCARD', K.virtual_times .. kind) * (t.flow and redis.call('ZCARD', K.virtual_times .. scope(t)) or 1)
  set(t, {queued_position = 1 + ahead + math.min(others, (ahead + 1) * (turns - 1))})
end
log_in_project(t, 'queued', event(t, 'queued'))
if idempotency ~= '' then redis.call('SET', K.idempotency .. idempotency, body_hash .. ' ' .. task_id, 'EX', 86400) end
if hit then
  set(t, {attempt = 1, run = 'made before', started_at_ms = now, current_step = 'starting'})
  move(t, 'processing')
  log(t, 'started')
  redis.call('ZADD', K.media, now, reused_prefix)
  redis.call('SET', K.reusable .. fingerprint, task_id)
  set(t, {result = reused_result, progress = 1, current_step = 'upload_complete'})
  conclude(t, 'completed', {'"result":' .. reused_result}, reused_cms)
end
return receipt('ok', t)
