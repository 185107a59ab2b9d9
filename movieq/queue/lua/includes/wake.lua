-- Waking idle workers by pub/sub.

-- Wakes one idle worker of a kind. If nobody receives the message, the worker has left, and the next one is woken.
local function wake(kind)
  for _ = 1, 16 do
    local worker = redis.call('SPOP', K.idle .. kind)
    if not worker or redis.call('PUBLISH', K.control .. worker, 'wake') > 0 then return end
  end
end
