#!lua flags=allow-oom
-- Gives a worker the turn to delete what is over, unless another has it. The turn expires, so that a worker that dies with it holds up nobody.
-- args: worker_id turn_ms
--   turn_ms: for how long, from now even where it has the turn already; 0 gives it back
-- Returns 1 where the worker has the turn now, else 0. Cost: O(1).
local has = redis.call('GET', K.sweeper)
if has and has ~= worker_id then return 0 end
if turn_ms == '0' then
  redis.call('DEL', K.sweeper)
  return 0
end
redis.call('SET', K.sweeper, worker_id, 'PX', turn_ms)
return 1
