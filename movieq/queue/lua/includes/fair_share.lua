-- Fair shares: each project has a virtual time in each lane, and the project with the least is next.
-- include: counters lanes

-- Adds the task's project to the lane's shares, with at least the virtual time of the lane's last claim.
local function join_share(t)
  if redis.call('ZSCORE', K.virtual_times .. lane(t), t.project_id) then return end
  local idle = tonumber(redis.call('HGET', K.idle_virtual_times .. lane(t), t.project_id) or 0)
  local claimed = tonumber(redis.call('GET', K.claimed_virtual_time .. lane(t)) or 0)
  redis.call('ZADD', K.virtual_times .. lane(t), math.max(idle or 0, claimed or 0), t.project_id)
end

-- Removes a project without waiting tasks from a lane's shares, and stores its virtual time. Removes a lane of a task type and model from
-- the list of lanes when it is empty.
local function leave_share(kind, of, project_id)
  if redis.call('EXISTS', K.waiting .. of .. ':' .. project_id) == 0 then
    local virtual = redis.call('ZSCORE', K.virtual_times .. of, project_id)
    if virtual then redis.call('HSET', K.idle_virtual_times .. of, project_id, virtual) end
    redis.call('ZREM', K.virtual_times .. of, project_id)
  end
  if of ~= kind and redis.call('EXISTS', K.virtual_times .. of) == 0 then redis.call('SREM', K.lanes .. kind, of) end
end

-- Adds a duration to the virtual time of the task's project, divided by the project's weight and the number of tasks in the batch.
local function charge(t, ms)
  ms = ms / (t.weight or 1) / (t.rows or 1)
  if redis.call('ZSCORE', K.virtual_times .. lane(t), t.project_id) then
    redis.call('ZINCRBY', K.virtual_times .. lane(t), ms, t.project_id)
  else
    count(K.idle_virtual_times .. lane(t), t.project_id, ms)
  end
end
