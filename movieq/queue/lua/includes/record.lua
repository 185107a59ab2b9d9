-- The task's hash as a table: `load` reads it, `set` and `unset` change it, and the loader calls `save` after the script, which writes each
-- changed task once. Lua is not rolled back, so a script checks its arguments and reads what it needs before its first write.
-- include: time

local loaded, changed = {}, {}

-- Sets fields: in the table at once, in the hash when the script ends.
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

-- Whether the text is a number that can be used; NaN is none. As a time it is at most in the year 2286.
local function numeric(text)
  local value = tonumber(text)
  return value and value > -1e13 and value < 1e13
end

local FIELDS, NUMBERS -- created when the first record is read: many calls read none

-- Completes a record from which fields are missing, so that one damaged task stops neither itself nor others.
local function mend(t)
  -- The fields of every record, and the value of one that was lost or damaged.
  FIELDS = FIELDS or {
    created_at_ms = now, created_us = 0, bias_ms = 0, priority = 2, estimate_ms = 60000, max_ms = 18000000, attempt = 0, tries = 0,
    deaths = 0, silences = 0, progress = 0, queued_position = 1, engine = '', model = '', shape = 'unknown',
    current_step = 'waiting_in_queue', warnings = '[]',
  }
  -- Numbers that a record may hold: a damaged one counts as absent.
  NUMBERS = NUMBERS or {
    'start_by_ms', 'finish_by_ms', 'ended_at_ms', 'remaining_ms', 'weight', 'rows', 'refunded', 'made_ms', 'made_at_ms', 'gpu_ms',
    'gpu_before_ms', 'gpu_billed_ms', 'gpu_at_ms', 'gpu_share', 'passed_ms', 'logged', 'batch_rows', 'deliveries', 'retried_position',
    'step', 'steps',
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
    if t[name] and tonumber(t[name]) <= 0 then unset(t, name) end -- it is a divisor
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

-- Returns the task; nil if there is none, or if its project, type, kind or state is lost: nobody can tell what it was.
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

-- Forgets what was changed: `save` does not write this task.
local function discard(t)
  changed[t] = nil
end

-- Writes the changed fields, one HSET and one HDEL a task.
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
