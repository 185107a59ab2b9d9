#!lua flags=allow-oom
-- Takes a worker that ends out of the heartbeats and the idle sets. What it still holds is left to its leases.
-- args: worker_id
-- Returns 'ok'. Cost: O(kinds).
redis.call('HDEL', K.workers, worker_id)
redis.call('HDEL', K.able, worker_id)
redis.call('ZREM', K.beats, worker_id)
redis.call('SREM', K.idle .. 'deliveries', worker_id)
redis.call('DEL', K.claimed .. worker_id)
for _, kind in ipairs(redis.call('SMEMBERS', K.kinds)) do redis.call('SREM', K.idle .. kind, worker_id) end
return 'ok'
