#!lua flags=allow-oom
-- Gives a worker the turn to sweep, unless another worker has it.
-- args: worker_id turn_ms
--   worker_id: of the worker
--   turn_ms: length of the turn from now, also if the worker already has it; '0' ends it
-- Returns 1 if the worker has the turn now, else 0.
-- The turn expires, so that a dead worker does not block the sweep.
-- Cost: O(1).
local has = redis.call('GET', K.sweeper)
if has and has ~= worker_id then return 0 end
if turn_ms == '0' then
  redis.call('DEL', K.sweeper)
  return 0
end
redis.call('SET', K.sweeper, worker_id, 'PX', turn_ms)
return 1
