#!lua flags=allow-oom
-- Removes a stopping worker from the list of workers and the idle sets. Runs that it still has are requeued when their leases expire.
-- args: worker_id
--   worker_id: of the worker
-- Returns 'ok'.
-- Cost: O(kinds).
redis.call('HDEL', K.workers, worker_id)
redis.call('HDEL', K.abilities, worker_id)
redis.call('ZREM', K.heartbeat_times, worker_id)
redis.call('SREM', K.idle .. 'deliveries', worker_id)
redis.call('DEL', K.claimed .. worker_id)
for _, kind in ipairs(redis.call('SMEMBERS', K.kinds)) do redis.call('SREM', K.idle .. kind, worker_id) end
return 'ok'
