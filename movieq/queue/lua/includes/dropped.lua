-- Entries of lists whose task has no record, or does not belong there: the entry is removed and noted.
-- include: counters record

-- Notes an entry that the caller has removed; the next call of `tidy` returns it.
local function note_dropped(list, task_id)
  count(K.sums, 'entries dropped', 1)
  redis.call('LPUSH', K.dropped, list .. ' ' .. task_id)
  redis.call('LTRIM', K.dropped, 0, 999)
  redis.call('EXPIRE', K.dropped, 86400)
end

-- Calls `act` for a task that the sorted set `key` names. If the record is so damaged that this fails, the entry is removed: the other tasks
-- go on.
local function guarded(list, key, task_id, act)
  if pcall(act) then return end
  if loaded[task_id] then discard(loaded[task_id]) end
  redis.call('ZREM', key, task_id)
  note_dropped(list, task_id)
end
