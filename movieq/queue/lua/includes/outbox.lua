-- The outbox: the deliveries of a task, added by the same script as the event that they report.
-- include: time record record_bytes delivery_jobs

-- Adds a delivery with the task's current facts, which count as bytes of the task. Returns its id.
local function add_delivery(t, kind, url, event_type, delay_ms)
  set(t, {deliveries = (t.deliveries or 0) + 1})
  local id = t.task_id .. '-' .. t.deliveries
  local facts = {
    'kind', kind, 'type', event_type, 'status', t.status, 'url', url, 'at_ms', now, 'metadata', t.metadata or '{}', 'state', 'pending',
  }
  for _, name in ipairs({
    'task_id', 'project_id', 'task_type', 'result', 'payload_media_id', 'error', 'error_code', 'started_at_ms', 'ended_at_ms',
  }) do
    if t[name] and (name ~= 'started_at_ms' or t.run) then -- no start time for a task that ended while it waited
      facts[#facts + 1] = name
      facts[#facts + 1] = t[name]
    end
  end
  redis.call('HSET', K.delivery .. id, unpack(facts))
  count_bytes(t, OVERHEAD.delivery + #table.concat(facts))
  redis.call('EXPIRE', K.delivery .. id, 30 * 86400)
  schedule(id, id, delay_ms)
  return id
end

-- Adds the deliveries of an event: one to the CMS at the address `cms`, if any, and one to the task's callback URL. The webhook waits at
-- most half a minute for the CMS. Pending webhooks of earlier events become due at once, since webhooks are sent in order.
local function deliver(t, event_type, cms)
  local first = cms and cms ~= '' and add_delivery(t, 'payload', cms, event_type, 0)
  if not t.callback_url then return end
  for n = 1, t.deliveries or 0 do
    local before = redis.call('HMGET', K.delivery .. t.task_id .. '-' .. n, 'kind', 'state')
    if before[1] == 'webhook' and before[2] == 'pending' then make_due(t.task_id .. '-' .. n) end
  end
  local webhook = add_delivery(t, 'webhook', t.callback_url, event_type, first and 30000 or 0)
  if first then redis.call('HSET', K.delivery .. first, 'webhook', webhook) end
end
