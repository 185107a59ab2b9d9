-- The task's hash as a table: `load` reads it, `set` and `unset` change it, and `save`, which is called after the script, writes each
-- changed task once. Redis does not roll a script back, so a script checks its arguments and reads what it needs before its first write.
-- include: time

local loaded, changed = {}, {}

-- Sets fields, in the table at once, in the hash when the script ends.
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

-- Returns whether the text is a usable number: not NaN, and as a time (ms) at most in the year 2286.
local function numeric(text)
  local value = tonumber(text)
  return value and value > -1e13 and value < 1e13
end

local FIELDS, NUMBERS -- created when the first record is read, since many calls read none

-- Replaces missing and damaged fields of a record, so that a damaged task can be handled and affects no other task.
local function mend(t)
  -- The required fields, and the values that replace missing or damaged ones.
  FIELDS = FIELDS or {
    created_at_ms = now, created_us = 0, bias_ms = 0, priority = 2, estimate_ms = 60000, max_ms = 18000000, attempt = 0, tries = 0,
    deaths = 0, silences = 0, progress = 0, queued_position = 1, engine = '', model = '', shape = 'unknown',
    current_step = 'waiting_in_queue', warnings = '[]',
  }
  -- Optional numbers; a damaged one is removed.
  NUMBERS = NUMBERS or {
    'start_by_ms', 'finish_by_ms', 'ended_at_ms', 'remaining_ms', 'weight', 'rows', 'refunded', 'made_ms', 'made_at_ms', 'gpu_ms',
    'gpu_before_ms', 'gpu_billed_ms', 'gpu_at_ms', 'gpu_share', 'passed_ms', 'logged', 'batch_rows', 'deliveries', 'retried_position',
    'step', 'steps', 'retries', 'bytes',
  }
  local mended = {}
  for name, default in pairs(FIELDS) do
    if not t[name] or type(default) == 'number' and not numeric(t[name]) then mended[name] = default end
  end
  for _, name in ipairs(NUMBERS) do
    if t[name] and not numeric(t[name]) then unset(t, name) end
  end
  if t.gpu_share and not (t.gpu_before_ms and t.gpu_at_ms and t.gpu_ms) then unset(t, 'gpu_share') end
  if t.deliveries and tonumber(t.deliveries) > 10000 then unset(t, 'deliveries') end -- scripts loop up to this number
  for _, name in ipairs({'weight', 'rows'}) do
    if t[name] and tonumber(t[name]) <= 0 then unset(t, name) end -- it is a divisor
  end
  if t.lane and t.lane ~= t.kind .. '/' .. t.task_type .. '/' .. t.model then unset(t, 'lane') end
  if t.flow and not string.match(t.flow, '^%x+$') then unset(t, 'flow') end
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

-- Returns the task; nil if it does not exist, or if its project, task type, kind or state is missing, without which it cannot be handled.
local function load(task_id)
  if loaded[task_id] then return loaded[task_id] end
  local flat = redis.pcall('HGETALL', K.task .. task_id)
  if flat.err or #flat == 0 then return nil end -- an error: the key has another type
  local t = {}
  for i = 1, #flat, 2 do t[flat[i]] = flat[i + 1] end
  if not (t.project_id and t.task_type and t.kind and t.status) then return nil end
  t.task_id = task_id
  mend(t)
  loaded[task_id] = t
  return t
end

-- Discards the task's changes, so that `save` does not write them.
local function discard(t)
  changed[t] = nil
end

-- Writes the changed fields with at most one HSET and one HDEL for each task.
local function save()
  for t, names in pairs(changed) do
    local written, deleted = {}, {}
    for name in pairs(names) do
      if t[name] then
        written[#written + 1] = name
        written[#written + 1] = t[name]
      else
        deleted[#deleted + 1] = name
      end
    end
    if #written > 0 then redis.call('HSET', K.task .. t.task_id, unpack(written)) end
    if #deleted > 0 then redis.call('HDEL', K.task .. t.task_id, unpack(deleted)) end
  end
end
