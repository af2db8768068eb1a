-- reap(tag; max_attempts, max_claims, max_jobs, lease_ms, stall_ms) -> {requeued, dead, past their deadline, unread}
-- Run by any process, on a clock: jobs of expired leases go back to the head of the queue; jobs past their deadline, or
-- without readers, are ended.
local SET_BACK_MS = 1000  -- less is no step of a clock
local now, budget = now_ms(), tonumber(ARGV[3])
local requeued, dead, late, unread = 0, 0, 0, 0

-- If no reap ran for so long, Redis itself was stopped: live workers get time to renew before they count as dead.
-- A full one lets nobody renew: leases and readers stand still then, and only what nobody wants any more is ended.
local looked = redis.pcall('GETSET', key('looked'), now)
local is_full = type(looked) == 'table'
if is_full and not string.find(looked.err, 'OOM', 1, true) then error(looked.err) end
local passed_ms = is_full and 0 or now - (tonumber(looked) or now)
if is_full then insist() end
if passed_ms < -SET_BACK_MS then                        -- the clock was: what is counted by it moves with it
  for _, name in ipairs({'leases', 'readers', 'deadlines'}) do
    for _, member in ipairs(redis.call('ZRANGE', key(name), 0, -1)) do
      redis.call('ZINCRBY', key(name), passed_ms, member)
    end
  end
end
if passed_ms > tonumber(ARGV[5]) then
  for _, worker in ipairs(redis.call('ZRANGE', key('leases'), 0, -1)) do renew(worker, ARGV[4]) end
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', key('readers'), '-inf', now)) do
    redis.call('ZADD', key('readers'), now + ARGV[4], job)
  end
end

for _, worker in ipairs(redis.call('ZRANGEBYSCORE', key('leases'), '-inf', now, 'LIMIT', 0, is_full and 0 or 16)) do
  local held = key('held:' .. worker)
  for _, job in ipairs(redis.call('SRANDMEMBER', held, budget)) do
    local outcome = requeue(job, true, tonumber(ARGV[1]), tonumber(ARGV[2]))
    if outcome == 'ready' then requeued = requeued + 1 elseif outcome == 'dead' then dead = dead + 1
    elseif not outcome then redis.call('SREM', held, job) end
    budget = budget - 1
  end
  if redis.call('EXISTS', held) == 0 then forget(worker) end
  if budget <= 0 then break end
end

for _, job in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, math.max(budget, 1))) do
  if not terminate(job, 'deadline_exceeded', 'expired') then redis.call('ZREM', key('deadlines'), job) end
  late = late + 1
end

budget = math.max(budget - late, 1)
local most = is_full and -1 or budget                   -- in a full one most are passed over
for _, job in ipairs(redis.call('ZRANGEBYSCORE', key('readers'), '-inf', now, 'LIMIT', 0, most)) do
  if unread >= budget then break end
  if not is_full or redis.call('HGET', key('job:' .. job), 'pods') == '' then
    if not terminate(job, 'cancelled', 'cancelled') then redis.call('ZREM', key('readers'), job) end
    unread = unread + 1
  end
end

count('requeued', requeued)
flush_pushes()
return {requeued, dead, late, unread}
