-- Fair shares: each flow has a virtual time in each lane, and the flow with the least is next. A flow is a project or, for tasks of a key
-- that may use all projects, the key: by inventing projects it gets no more. In the flow of a key, its projects share in the same way.
-- include: counters lanes

-- Returns the task's shares, its project's first. Of each: the scope, the project or flow that has a virtual time there, and the hash and
-- field in which that is stored while nothing of it waits. `sweep` deletes those of a project without knowing its flows.
local function shares(t)
  local of = lane(t)
  if not t.flow then return {{of, t.project_id, of, t.project_id}} end
  local flow = '@' .. t.flow
  return {{scope(t), t.project_id, of .. ':' .. t.project_id, flow}, {of, flow, of, flow}}
end

-- Adds the task's project and flow to the shares, with at least the virtual time of the last claim there.
local function join_share(t)
  for _, share in ipairs(shares(t)) do
    local of, member, idle_in, as = unpack(share)
    if not redis.call('ZSCORE', K.virtual_times .. of, member) then
      local idle = tonumber(redis.call('HGET', K.idle_virtual_times .. idle_in, as) or 0)
      local claimed = tonumber(redis.call('GET', K.claimed_virtual_time .. of) or 0)
      redis.call('ZADD', K.virtual_times .. of, math.max(idle or 0, claimed or 0), member)
    end
  end
end

-- Removes the task's project from the shares if none of its tasks waits in this flow, and the flow if none of its projects does, and stores
-- their virtual times. Removes a lane of a task type and model from the list of lanes when it is empty.
local function leave_share(t)
  local members = queue(t)
  for _, share in ipairs(shares(t)) do
    if redis.call('EXISTS', members) == 1 then return end
    local of, member, idle_in, as = unpack(share)
    local virtual = redis.call('ZSCORE', K.virtual_times .. of, member)
    if virtual then redis.call('HSET', K.idle_virtual_times .. idle_in, as, virtual) end
    redis.call('ZREM', K.virtual_times .. of, member)
    members = K.virtual_times .. of
  end
  if t.lane and redis.call('EXISTS', members) == 0 then redis.call('SREM', K.lanes .. t.kind, t.lane) end
end

-- Adds a duration, divided by the number of tasks in the batch, to the virtual times of the task's project and flow. The project's is
-- divided by its weight too.
local function charge(t, ms)
  for _, share in ipairs(shares(t)) do
    local of, member, idle_in, as = unpack(share)
    local cost = ms / (member == t.project_id and t.weight or 1) / (t.rows or 1)
    local waits = redis.call('ZADD', K.virtual_times .. of, 'XX', 'INCR', cost, member)
    if not waits then count(K.idle_virtual_times .. idle_in, as, cost) end
  end
end
