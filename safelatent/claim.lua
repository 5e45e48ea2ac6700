-- Take the job whose turn it is (turns.py), and hold it under a lease until RQ does.
--
-- KEYS  turns, clock, bell of the model
-- ARGV  patterns of names: queue(tenant, priority), started registry(tenant, priority),
--       job(id), executions(id), share(tenant); seconds of the lease; the priorities
-- Returns {id, tenant, priority}, or nothing.

local turns, clock_key, bell = unpack(KEYS)
local queue_of, started_of, job_of, executions_of, share_of, lease_s = unpack(ARGV)
local priorities = {unpack(ARGV, 7)}
local now = tonumber(redis.call('TIME')[1])
local clock = tonumber(redis.call('GET', clock_key) or 1)

local function exactly(number)
  return string.format('%.17g', number)
end

-- Whether somebody has this job under a lease. Two cleaners that find it abandoned both queue it.
local function is_held(id, started)
  local holders = redis.call('ZRANGE', string.format(executions_of, id), 0, -1)
  holders[#holders + 1] = 'claim'
  for _, holder in ipairs(holders) do
    local until_s = redis.call('ZSCORE', started, id .. ':' .. holder)
    if until_s and tonumber(until_s) > now then return true end
  end
  return false
end

-- A tenant's most urgent, oldest job; entries of jobs that are gone, ended or held are dropped.
local function take(tenant)
  for _, priority in ipairs(priorities) do
    local queue = string.format(queue_of, tenant, priority)
    local started = string.format(started_of, tenant, priority)
    local id = redis.call('LPOP', queue)
    while id do
      local job = string.format(job_of, id)
      local status, cost = unpack(redis.call('HMGET', job, 'status', 'cost'))
      if status == 'queued' then
        redis.call('HSET', job, 'status', 'started')
        if not is_held(id, started) then
          redis.call('ZADD', started, now + lease_s, id .. ':claim')
          return id, priority, tonumber(cost or 1)
        end
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
