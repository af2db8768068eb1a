-- publish(tag; worker, lease_ms, sequence, (job, epoch, position, tokens, kind, data)...) -> {outcome...}
-- One script per engine step for the whole batch: append, push what was appended, finish what ended, renew the lease.
-- outcome: 'ok', 'refused' (the job is no longer this worker's: lease lost, cancelled, past its deadline), 'gone'
-- (there is no log, or it lacks what comes before). kind 'hold' appends nothing: it asks whether the job is still this
-- worker's.
-- `sequence` counts a worker's publishes; 1 starts a new count. If the previous one is missing, this Redis lacks
-- acknowledged data: {'behind'} alone, and nothing was written.
local worker, sequence, outcomes = ARGV[1], tonumber(ARGV[3]), {}
local self = key('sequence:' .. worker)
local before = tonumber(redis.call('HGET', self, 'published') or 0)
if sequence > 1 and before ~= sequence - 1 and before ~= sequence then return {'behind'} end
redis.call('HSET', self, 'published', sequence)

local function hold(job, epoch)
  local newest = last(job)
  if not newest then return 'gone' end
  local is_held = redis.call('SISMEMBER', key('held:' .. worker), job) == 1 and newest == tonumber(epoch)
  return is_held and 'ok' or 'refused'
end

-- Without a gap, and nothing twice: a log that was restored may not know the claim under which this worker writes.
local function say(job, epoch, position, tokens, kind, data)
  local newest_epoch, newest = last(job)
  if newest and tonumber(epoch) >= newest_epoch then
    if tonumber(position) > newest + 1 then return 'gone' end
    if tonumber(position) <= newest and tonumber(epoch) > newest_epoch then return 'refused' end
  end
  return append(job, epoch .. '-' .. position, position, tokens, kind, data)
end

for i = 4, #ARGV, 6 do
  local job, epoch, position, tokens, kind, data = unpack(ARGV, i, i + 5)
  local is_hold = kind == 'hold'
  local outcome = is_hold and hold(job, epoch) or say(job, epoch, position, tokens, kind, data)
  if outcome == 'ok' and not is_hold then
    push(job, epoch, position, tokens, kind, data)
    if kind == 'end' then retire(job, 'finished') end
  elseif outcome == 'refused' and redis.call('HGET', key('job:' .. job), 'worker') ~= worker then
    redis.call('SREM', key('held:' .. worker), job)                     -- otherwise it holds a later claim of the job
  end
  table.insert(outcomes, outcome)
end
renew(worker, ARGV[2])
flush_pushes()
return outcomes
