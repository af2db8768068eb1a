-- claim(tag; worker, lease_ms, sequence, free_choices, tokenizer_id, weights_id, numerics_id, patience_ms, max_scan)
--   -> {{job, epoch, position, tokens, alone, request}...}
-- The same sequence number again gives the same jobs again: a claim whose reply was lost loses nothing.
local worker, free, patience_ms = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[8])
local self = key('worker:' .. worker)
local now = now_ms()
renew(worker, ARGV[2])

local function describe(job, alone)
  local epoch, position, tokens = last(job)
  return {job, epoch, position, tokens, alone, redis.call('HGET', key('job:' .. job), 'request') or ''}
end

local before = redis.call('HMGET', self, 'claim', 'claimed')
if before[1] == ARGV[3] then
  local reply = {}
  for job, alone in string.gmatch(before[2], '(%S+):(%d)') do
    if redis.call('SISMEMBER', key('held:' .. worker), job) == 1 then table.insert(reply, describe(job, tonumber(alone))) end
  end
  return reply
end

local empty = redis.call('SCARD', key('held:' .. worker)) == 0

-- A job that took down a worker runs alone. When all are busy, one of them is reserved: it takes nothing more until it
-- is empty.
local function reserve(hash)
  local r = redis.call('HMGET', hash, 'reserved_by', 'reserved_ms')
  if r[1] and r[1] ~= worker and now - r[2] < 2 * ARGV[2] then return false end
  redis.call('HSET', hash, 'reserved_by', worker, 'reserved_ms', now)
  return true
end

-- suits -> 'take', 'skip' or 'stop' (nothing behind it may overtake)
local function suits(hash, f)
  local waited_ms, started = now - f[6], tonumber(f[7]) > 0
  if f[3] ~= ARGV[5] then return 'skip' end
  if started and f[4] ~= ARGV[6] then return 'skip' end
  if started and f[5] ~= ARGV[7] and waited_ms < patience_ms then return 'skip' end
  if tonumber(f[1]) > 0 and not empty then
    if waited_ms > patience_ms and reserve(hash) then return 'stop' end
    return 'skip'
  end
  if tonumber(f[2]) > free then return waited_ms > patience_ms and 'stop' or 'skip' end
  return 'take'
end

local function take(job, hash, f)
  local epoch, position, tokens = last(job)
  if not epoch or append(job, (epoch + 1) .. '-0', position, tokens, 'fence', '"' .. worker .. '"') ~= 'ok' then
    retire(job, 'lost')
    return nil
  end
  redis.call('HSET', hash, 'state', 'running', 'worker', worker, 'claim_position', position, 'claimed_ms', now)
  redis.call('HINCRBY', hash, 'claims', 1)
  if position == 0 then redis.call('HSET', hash, 'weights_id', ARGV[6], 'numerics_id', ARGV[7]) end
  redis.call('XCLAIM', key('jobs'), GROUP, worker, 0, f[8], 'JUSTID')
  redis.call('SADD', key('held:' .. worker), job)
  redis.call('ZREM', key('ready'), job)
  local virtual_time = tonumber(redis.call('HGET', key('fair'), '') or 0)
  redis.call('HSET', key('fair'), '', math.max(virtual_time, tonumber(f[9])))
  free = free - f[2]
  return describe(job, tonumber(f[1]) > 0 and 1 or 0)
end

local reply, claimed = {}, {}
for _, job in ipairs(redis.call('ZRANGE', key('ready'), 0, ARGV[9] - 1)) do
  if free <= 0 then break end
  local hash = key('job:' .. job)
  local f = redis.call('HMGET', hash, 'attempts', 'choices', 'tokenizer_id', 'weights_id', 'numerics_id', 'ready_ms',
                       'claim_position', 'entry', 'start_tag')
  local verdict = 'skip'
  if f[8] then
    f[7] = select(2, last(job)) or 0
    verdict = suits(hash, f)
  else
    redis.call('ZREM', key('ready'), job)
  end
  if verdict == 'stop' then break end
  local taken = verdict == 'take' and take(job, hash, f)
  if taken then
    table.insert(reply, taken)
    table.insert(claimed, job .. ':' .. taken[5])
    if taken[5] == 1 then break end
    empty = false
  end
end
redis.call('HSET', self, 'claim', ARGV[3], 'claimed', table.concat(claimed, ' '))
return reply
