-- A picture of a model's queue, for positions and ETAs; nothing is changed.
--
-- KEYS  turns, clock, tenants of the model; workers
-- ARGV  the model; patterns of names: queue(tenant, priority), started registry(tenant, priority),
--       share(tenant), pace(worker); the priorities
-- Returns {clock, jobs that run, {{tenant, may start, weight, max running, mean cost, queued},
--         ...}, {pace, ...}}.

local turns, clock_key, tenants, workers = unpack(KEYS)
local model, queue_of, started_of, share_of, pace_of = unpack(ARGV)
local priorities = {unpack(ARGV, 6)}

local running = 0
for _, tenant in ipairs(redis.call('SMEMBERS', tenants)) do
  for _, priority in ipairs(priorities) do
    running = running + redis.call('ZCARD', string.format(started_of, tenant, priority))
  end
end

local lines = {}
local members = redis.call('ZRANGE', turns, 0, -1, 'WITHSCORES')
for place = 1, #members, 2 do
  local tenant = members[place]
  local queued = 0
  for _, priority in ipairs(priorities) do
    queued = queued + redis.call('LLEN', string.format(queue_of, tenant, priority))
  end
  if queued > 0 then
    local share = string.format(share_of, tenant)
    local weight, max_running, cost =
      unpack(redis.call('HMGET', share, 'weight', 'max_running', 'cost'))
    lines[#lines + 1] = {
      tenant, members[place + 1], weight or 1, max_running or '', cost or 1, queued
    }
  end
end

local paces = {}
local now = redis.call('TIME')[1]
for _, member in ipairs(redis.call('ZRANGEBYSCORE', workers, now, '+inf')) do
  local space = string.find(member, ' ', 1, true)
  if string.sub(member, space + 1) == model then
    local name = string.format(pace_of, string.sub(member, 1, space - 1))
    paces[#paces + 1] = redis.call('GET', name) or ''
  end
end
return {redis.call('GET', clock_key) or 1, running, lines, paces}
