-- Idle workers, woken by pub/sub.

-- Wakes one idle worker of a kind; one that has gone receives nothing, so then the next.
local function wake(kind)
  for _ = 1, 16 do
    local worker = redis.call('SPOP', K.idle .. kind)
    if not worker or redis.call('PUBLISH', K.control .. worker, 'wake') > 0 then return end
  end
end
