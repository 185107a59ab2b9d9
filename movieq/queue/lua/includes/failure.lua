-- The end of a task that fails.
-- include: time record messages text finish

local function fail(t, message, code, retryable)
  message = cut(message)
  unset(t, 'result') -- only a damaged record has one
  set(t, {error = message, error_code = code, retryable = retryable, ended_as = 'failed'})
  finish(t, 'failed', {'"error":' .. json(message), '"error_code":' .. json(code), '"retryable":' .. tostring(retryable)})
end

-- Fails a task as a dead letter: its worker or engine process has died with it too often.
local function fail_as_dead_letter(t, message)
  redis.call('ZADD', K.dead, now, t.task_id)
  fail(t, message, 'worker_lost', true)
end
