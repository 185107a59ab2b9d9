#!lua flags=allow-oom
-- Admits due deliveries to the free places of a worker, in fair shares: the project with the fewest deliveries in flight is next. A project
-- and a host each get a place for a webhook only while they have fewer webhooks in flight than places are free: half of the places if they
-- are alone, an equal share that leaves another one free if there are more. Due deliveries wait in a queue for each kind and project.
-- args: worker_id nonce held_ms webhook_places payload_places in_flight
--   worker_id: of the worker
--   nonce: random; a repeated call with the same nonce gets the same answer
--   held_ms: time until an admitted job can be admitted again, if its worker dies
--   webhook_places: free places for webhooks
--   payload_places: free places for CMS deliveries, which have no other limit
--   in_flight: JSON of {queues, hosts}: queue or host -> the number of its deliveries that this worker runs
-- Returns {[{job, score, queue, host}, ...], 1 if due deliveries are left, 1 if not all could be looked at}: the score is that of the job
--   in the arq queue from now on.
-- Appends nothing. Every due delivery stays in the arq queue, in a minute or after held_ms at the latest: if the other lists are lost, it
--   is found there. The answer is stored for a minute.
-- Cost: O(log n) for each of at most 500 deliveries that have become due and of those admitted; of at most 100 queues, O(20) for each whose
--   hosts have their share. With more queues, those are next that have waited longest to be looked at.
-- include: time hosts
local SORTED, BLOCKED, QUEUES, WAIT_MS, ROUND_MS = 500, 20, 100, 60000, 500
local stored = redis.pcall('GET', K.admitted .. worker_id)
if type(stored) == 'string' then
  local readable, of, answer = pcall(cmsgpack.unpack, stored)
  if readable and of == nonce then return answer end
end
local counts = cjson.decode(in_flight)
local free = {webhook = tonumber(webhook_places), payload = tonumber(payload_places)}

local function delivery(job)
  return K.delivery .. string.match(job, '^[^.]*')
end

-- Adds a due job to its queue. A key of another type is replaced: the jobs in it are due again in a minute.
local function sort(job, due_ms)
  local facts = redis.pcall('HMGET', delivery(job), 'kind', 'project_id')
  local due_queue = (facts[1] == 'payload' and 'payload:' or 'webhook:') .. (facts[2] or '')
  if type(redis.pcall('ZADD', K.due_deliveries .. due_queue, 'LT', due_ms, job)) == 'table' then
    redis.call('DEL', K.due_deliveries .. due_queue)
    redis.call('ZADD', K.due_deliveries .. due_queue, due_ms, job)
  end
  redis.call('ZADD', K.due_queues, 'NX', now, due_queue)
  redis.call('ZADD', K.deliveries, now + WAIT_MS, job)
end

local due, sorted = redis.call('ZRANGEBYSCORE', K.deliveries, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 4 * SORTED), 0
for i = 1, #due, 2 do
  if redis.call('EXISTS', K.in_progress .. due[i]) == 0 then -- else it runs for longer than held_ms
    sort(due[i], due[i + 1])
    sorted = sorted + 1
    if sorted == SORTED then break end
  end
end

local queues = {}
for i, name in ipairs(redis.call('ZRANGE', K.due_queues, 0, QUEUES - 1)) do
  local kind = string.match(name, '^payload:') and 'payload' or 'webhook'
  queues[i] = {name = name, key = K.due_deliveries .. name, kind = kind, in_places = counts.queues[name] or 0, blocked = 0}
end

-- Returns the queue whose turn it is; nil if no queue may get a place.
local function next_queue()
  local found
  for _, due_queue in ipairs(queues) do
    local limit = due_queue.kind == 'payload' and free.payload > 0 and math.huge or free[due_queue.kind]
    if not due_queue.passed and due_queue.in_places < limit and (not found or due_queue.in_places < found.in_places) then found = due_queue end
  end
  return found
end

-- Returns the first job of the queue whose host may get a place, and its host; nil if there is none among the first ones.
local function take(due_queue)
  due_queue.jobs = due_queue.jobs or redis.pcall('ZRANGE', due_queue.key, 0, free[due_queue.kind] + BLOCKED - 1)
  while #due_queue.jobs > 0 and due_queue.blocked < BLOCKED do
    local job = table.remove(due_queue.jobs, 1)
    if not redis.call('ZSCORE', K.deliveries, job) or redis.call('EXISTS', K.in_progress .. job) == 1 then
      redis.call('ZREM', due_queue.key, job) -- it has ended, or a worker of an older version runs it
    else
      local url = due_queue.kind == 'webhook' and redis.pcall('HGET', delivery(job), 'url')
      local host = host_of(type(url) == 'string' and url or '')
      if host == '' or (counts.hosts[host] or 0) < free.webhook then return job, host end
      due_queue.blocked = due_queue.blocked + 1
    end
  end
end

local admitted = {}
local due_queue = next_queue()
while due_queue do
  local job, host = take(due_queue)
  if job then
    redis.call('ZREM', due_queue.key, job)
    redis.call('PSETEX', K.in_progress .. job, held_ms, '1')
    redis.call('ZADD', K.deliveries, now + held_ms, job)
    admitted[#admitted + 1] = {job, now + held_ms, due_queue.name, host}
    free[due_queue.kind] = free[due_queue.kind] - 1
    due_queue.in_places = due_queue.in_places + 1
    if host ~= '' then counts.hosts[host] = (counts.hosts[host] or 0) + 1 end
  else
    due_queue.passed = true
  end
  due_queue = next_queue()
end

for _, each in ipairs(queues) do
  if redis.call('EXISTS', each.key) == 1 then
    redis.call('ZADD', K.due_queues, now, each.name) -- the next call looks at other queues first
  else
    redis.call('ZREM', K.due_queues, each.name)
  end
end
local longest = redis.call('ZRANGE', K.due_queues, 0, 0, 'WITHSCORES')
local more = sorted == SORTED or longest[2] and free.webhook > 0 and now - longest[2] > ROUND_MS
local answer = {admitted, longest[2] and 1 or 0, more and 1 or 0}
if #admitted > 0 then redis.call('SET', K.admitted .. worker_id, cmsgpack.pack(nonce, answer), 'PX', 60000) end
return answer
