#!lua flags=allow-oom
-- Gives one worker the turn to delete what retention does not cover, unless another has it.
-- args: worker_id turn_ms
--   worker_id: of the worker
--   turn_ms: how long the turn lasts, from now also for a worker that has it; '0' ends it
-- Returns 1 if the worker has the turn now, else 0.
-- The turn expires, so that a worker that dies with it blocks nobody.
-- Cost: O(1).
local has = redis.call('GET', K.sweeper)
if has and has ~= worker_id then return 0 end
if turn_ms == '0' then
  redis.call('DEL', K.sweeper)
  return 0
end
redis.call('SET', K.sweeper, worker_id, 'PX', turn_ms)
return 1
