-- Take the job whose turn it is (turns.py), and start an execution of it, as RQ would.
--
-- KEYS  turns, clock, bell of the model; executions of the worker
-- ARGV  patterns of names: queue(tenant, priority), started registry(tenant, priority),
--       job(id), executions(id), execution(id), share(tenant);
--       id and worker of the execution; seconds of the lease, and for which RQ's registries believe
--       in it; the priorities
-- Returns {id, tenant, priority}, or nothing.

local turns, clock_key, bell, worker_executions = unpack(KEYS)
local queue_of, started_of, job_of, executions_of, execution_of, share_of = unpack(ARGV)
local execution, worker, lease_s, registered_s = unpack(ARGV, 7)
local priorities = {unpack(ARGV, 11)}
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local clock = tonumber(redis.call('GET', clock_key) or 1)

local function exactly(number)
  return string.format('%.17g', number)
end

-- Put a job in the hands of this execution. Its executions are the fence (worker/leases.py).
local function start(id, started)
  local held, until_s = id .. ':' .. execution, now + registered_s
  local fence, hash = string.format(executions_of, id), string.format(execution_of, held)
  redis.call('HSET', string.format(job_of, id), 'status', 'started')
  redis.call('ZADD', started, until_s, held)
  redis.call('ZADD', fence, until_s, execution)
  redis.call('EXPIRE', fence, registered_s)
  redis.call('HSET', hash, 'id', execution, 'job_id', id, 'worker_name', worker,
    'created_at', now, 'last_heartbeat', now)
  redis.call('EXPIRE', hash, lease_s)
  redis.call('SADD', worker_executions, held)
  redis.call('EXPIRE', worker_executions, lease_s)  -- a worker's beat renews both
end

-- A tenant's most urgent, oldest job. An id may stand in a queue more than once, and entries of
-- jobs that are gone, have ended or are in somebody's hands are dropped: a job starts once.
local function take(tenant)
  for _, priority in ipairs(priorities) do
    local queue = string.format(queue_of, tenant, priority)
    local started = string.format(started_of, tenant, priority)
    local id = redis.call('LPOP', queue)
    while id do
      local job = string.format(job_of, id)
      local status, cost = unpack(redis.call('HMGET', job, 'status', 'cost'))
      local is_held = redis.call('ZCARD', string.format(executions_of, id)) > 0
      if not is_held and (status == 'queued' or status == 'started') then
        start(id, started)
        return id, priority, tonumber(cost or 1)
      elseif status == 'queued' then  -- a cleaner's word over a job that somebody holds
        redis.call('HSET', job, 'status', 'started')
      end
      id = redis.call('LPOP', queue)
    end
  end
end

local function running(tenant)
  local count = 0
  for _, priority in ipairs(priorities) do
    count = count + redis.call('ZCARD', string.format(started_of, tenant, priority))
  end
  return count
end

-- Who has just lined up starts at the clock. It is never behind where a tenant left, because that
-- was the least of all times then, but for the last job before all queues were empty.
for _, tenant in ipairs(redis.call('ZRANGEBYSCORE', turns, 0, 0)) do
  redis.call('ZADD', turns, exactly(clock), tenant)
end

local place = 0
while true do
  local tenant, may_start = unpack(redis.call('ZRANGE', turns, place, place, 'WITHSCORES'))
  if not tenant then break end
  local share = string.format(share_of, tenant)
  local weight, max_running, mean =
    unpack(redis.call('HMGET', share, 'weight', 'max_running', 'cost'))
  max_running = tonumber(max_running)
  if max_running and running(tenant) >= max_running then
    place = place + 1
  else
    local id, priority, cost = take(tenant)
    if id then
      clock = math.max(clock, tonumber(may_start))
      redis.call('SET', clock_key, exactly(clock))
      redis.call('ZADD', turns, exactly(clock + cost / tonumber(weight or 1)), tenant)
      mean = tonumber(mean or cost)
      redis.call('HSET', share, 'cost', exactly(mean + (cost - mean) / 10))
      return {id, tenant, priority}
    end
    redis.call('ZREM', turns, tenant)
  end
end
redis.call('DEL', bell)  -- whoever rang so far has been seen
