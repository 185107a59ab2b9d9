-- The schedule of deliveries: plain arq jobs in a queue of their own.
-- include: time wake

-- Queues an arq job that calls deliver(delivery_id) after delay_ms.
local function schedule(job, delivery_id, delay_ms)
  -- {t: nil, f: 'deliver', a: [id], k: {}, et: now}; the empty map is spelled out, since cmsgpack would pack it as a list
  redis.call('SET', K.job .. job,
    '\133\161t\192\161f' .. cmsgpack.pack('deliver') .. '\161a\145' .. cmsgpack.pack(delivery_id) .. '\161k\128\162et' .. cmsgpack.pack(now))
  redis.call('ZADD', K.deliveries, now + delay_ms, job)
  if delay_ms == 0 then wake('deliveries') end
end

-- Makes a scheduled delivery due now; returns false if none is scheduled.
local function make_due(delivery_id)
  local job = redis.call('HGET', K.delivery .. delivery_id, 'job') or delivery_id
  if not redis.call('ZSCORE', K.deliveries, job) then return false end
  redis.call('ZADD', K.deliveries, 'XX', 'LT', now, job)
  wake('deliveries')
  return true
end
