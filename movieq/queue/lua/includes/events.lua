-- Events: appended to the event logs of the task and its project, and published.
-- include: time record messages

-- Returns the JSON of an event. `extra` is a list of '"name":json' strings, so that stored JSON is copied unchanged.
local function event(t, event_type, extra)
  local remaining = t.remaining_ms and string.format('%.1f', t.remaining_ms / 1000) or 'null'
  local parts = {
    '"task_id":' .. json(t.task_id), '"project_id":' .. json(t.project_id), '"task_type":' .. json(t.task_type),
    '"type":' .. json(event_type), '"time":"' .. rfc3339(now) .. '"',
    '"attempt":' .. t.attempt, '"status":' .. json(t.status), '"progress":' .. t.progress, '"current_step":' .. json(t.current_step),
    '"stage":' .. json(t.stage), '"step":' .. (t.step or 'null'), '"steps":' .. (t.steps or 'null'), '"estimated_remaining":' .. remaining,
  }
  for _, piece in ipairs(extra or {}) do parts[#parts + 1] = piece end
  return '{' .. table.concat(parts, ',') .. '}'
end

-- Appends to the project's log, which holds the last thousand events (or a few more, since whole nodes are trimmed) for 24 h after the
-- last.
local function log_in_project(t, event_type, data)
  local name = 'project:' .. t.project_id
  publish(name, redis.call('XADD', K.log .. name, 'MAXLEN', '~', 1000, '*', 'type', event_type, 'data', data), event_type, data)
  redis.call('EXPIRE', K.log .. name, 86400)
end

-- Appends to the task's log, which holds the last two thousand events, and, except for progress, to the project's log.
local function log(t, event_type, extra)
  local data = event(t, event_type, extra)
  local id = redis.pcall('XADD', K.log .. t.task_id, 'MAXLEN', '~', 2000, '*', 'type', event_type, 'data', data)
  if type(id) == 'table' then -- the key has another type
    redis.call('DEL', K.log .. t.task_id)
    id = redis.call('XADD', K.log .. t.task_id, '*', 'type', event_type, 'data', data)
  end
  set(t, {last_event_id = id})
  publish(t.task_id, id, event_type, data)
  if event_type == 'progress' then
    publish('project:' .. t.project_id, '>' .. now, event_type, data)
  else
    log_in_project(t, event_type, data)
  end
end

-- Publishes an event without appending it to a log.
local function publish_event(t, event_type)
  local data = event(t, event_type)
  publish(t.task_id, '>' .. now, event_type, data)
  publish('project:' .. t.project_id, '>' .. now, event_type, data)
end
