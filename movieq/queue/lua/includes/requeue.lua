-- Requeueing a task after a run without a result.
-- include: time record run_fields index messages text events queue offers deadlines runs

-- Requeues the task, after a delay if there is one. Appends `retrying`.
local function requeue(t, delay_ms, message, code)
  message = cut(message)
  release(t, false)
  move(t, 'queued')
  set(t, {ended_run = t.run, ended_as = 'queued'})
  show_as_waiting(t)
  if offer(t, delay_ms) then -- offered to the workers of its host first
  elseif delay_ms > 0 then
    redis.call('ZADD', K.delayed, now + delay_ms, t.task_id)
  else
    enqueue(t)
  end
  watch_deadline(t)
  log(t, 'retrying', {'"error":' .. json(message), '"error_code":' .. json(code), '"retry_in":' .. string.format('%.1f', delay_ms / 1000)})
end
