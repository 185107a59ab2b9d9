-- Invalid entries of lists: their task has no record or does not belong in the list. The entry is removed and recorded.
-- include: counters record

-- Records an entry that the caller has removed; the next call of `tidy` returns it.
local function note_dropped(list, task_id)
  count(K.sums, 'entries dropped', 1)
  redis.call('LPUSH', K.dropped, list .. ' ' .. task_id)
  redis.call('LTRIM', K.dropped, 0, 999)
  redis.call('EXPIRE', K.dropped, 86400)
end

-- Calls `act` for a task in the sorted set `key`. If that fails because the record is damaged, removes the entry, so that other tasks are
-- not affected.
local function guarded(list, key, task_id, act)
  if pcall(act) then return end
  if loaded[task_id] then discard(loaded[task_id]) end
  redis.call('ZREM', key, task_id)
  note_dropped(list, task_id)
end
