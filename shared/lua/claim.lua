-- claim(tag; worker, lease_ms, sequence, free_choices, tokenizer_id, weights_id, numerics_id, patience_ms, max_scan,
--       prefix_patience_ms, prefix_ttl_ms, any_weights, most_choices, max_model_len, max_attempts,
--       max_claims, begun_only, job...)
--   -> {look_again_ms, {job, epoch, position, tokens, alone, is_like, request, header}...}
-- look_again_ms: time until this worker may take a job that was left to another; -1: no job was left.
-- The same sequence number returns the same jobs again: a claim whose reply was lost loses nothing. The jobs given are
-- all that the worker knows it has; others that it holds, because Redis lost data or a reply was lost, go back to the
-- queue ('*': unspecified).
local SHARE_MS = 10  -- for others to take their share of the queue
local PROOF_MS = 50  -- for jobs to get their first token
local MAX_PAGES = 16 -- of max_scan jobs each, searched for jobs that this worker can compute; its next claim goes on
local worker, free, max_scan = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[9])
local patience_ms, prefix_patience_ms, begun_only = tonumber(ARGV[8]), tonumber(ARGV[10]), ARGV[17] == '1'
local self, held = key('sequence:' .. worker), key('held:' .. worker)
local now, look_again_ms = now_ms(), -1
renew(worker, ARGV[2])

local function describe(job, alone)
  local epoch, position, tokens = last(job)
  local f = redis.call('HMGET', key('job:' .. job), 'request', 'numerics_id')
  local is_like = (position == 0 or f[2] == ARGV[7]) and 1 or 0         -- of what a pod restored nobody knows
  local header = redis.call('XRANGE', key('out:' .. job), '-', '+', 'COUNT', 1)[1][2][8]
  return {job, epoch, position, tokens, alone, is_like, f[1] or '', header}
end

local before = redis.call('HMGET', self, 'claim', 'claimed')
if tonumber(before[1] or 0) > tonumber(ARGV[3]) then return {-1} end       -- it arrives too late, and was repeated
if before[1] == ARGV[3] then
  local reply = {SHARE_MS}
  for job, alone in string.gmatch(before[2], '(%S+):(%d)') do
    if redis.call('SISMEMBER', held, job) == 1 then table.insert(reply, describe(job, tonumber(alone))) end
  end
  return reply
end

local known = {}
for i = 18, #ARGV do known[ARGV[i]] = true end
for _, job in ipairs(redis.call('SMEMBERS', held)) do
  if not known['*'] and not known[job] then hand_back(worker, job, false, tonumber(ARGV[15]), tonumber(ARGV[16])) end
end
local empty = redis.call('SCARD', held) == 0

local function leave_for(ms)
  if look_again_ms < 0 or ms < look_again_ms then look_again_ms = ms end
end

-- Whether a job still waits for a better worker; if so, this one looks again when that time is over.
local function is_patient(waited_ms, limit_ms)
  local rest_ms = limit_ms - math.abs(waited_ms)        -- negative after Redis' clock was set back
  if rest_ms > 0 then leave_for(rest_ms) end
  return rest_ms > 0
end

-- warmth(prefix names of a prompt) -> 'mine', 'theirs' (another live worker's) or nil: who computed the longest prefix
local function warmth(prefix)
  local names = {}
  for name in string.gmatch(prefix, '%S+') do table.insert(names, 1, key('prefix:' .. name)) end
  if #names == 0 then return nil end
  for _, owner in ipairs(redis.call('MGET', unpack(names))) do
    if owner == worker then return 'mine' end
    if owner and tonumber(redis.call('ZSCORE', key('leases'), owner) or 0) > now then return 'theirs' end
  end
end

local function has_started(job) return (select(2, last(job)) or 0) > 0 end

-- glance(job) -> what orders it in the queue; nil if this worker can never compute it, or it is no longer a job
local function glance(job)
  local f = redis.call('HMGET', key('job:' .. job), 'tokenizer_id', 'weights_id', 'choices', 'prefix', 'ready_ms',
                       'priority', 'length')
  if not f[1] then redis.call('ZREM', key('ready'), job) return nil end
  if f[1] ~= ARGV[5] then return nil end
  if f[2] ~= ARGV[6] and ARGV[12] ~= '1' and has_started(job) then return nil end
  if begun_only and (f[2] ~= ARGV[6] or not has_started(job)) then return nil end
  if tonumber(f[3]) > tonumber(ARGV[13]) or tonumber(f[7] or 0) > tonumber(ARGV[14]) then return nil end
  return {job = job, choices = tonumber(f[3]), prefix = f[4], warmth = warmth(f[4]), ready_ms = tonumber(f[5]),
          priority = tonumber(f[6])}
end

local function load(j)
  j.hash = key('job:' .. j.job)
  local f = redis.call('HMGET', j.hash, 'entry', 'attempts', 'numerics_id', 'start_tag')
  j.entry, j.attempts, j.numerics_id, j.start_tag = f[1], tonumber(f[2]), f[3], tonumber(f[4])
end

-- The head of the queue. Within the first priority band, jobs whose prefix this worker has cached come first, unless
-- one of the others has waited too long.
local page = tonumber(redis.call('HGET', self, 'page') or 0)
local function candidates()
  local line, mine, others, behind = {}, {}, {}, {}
  local first, is_over = page, false
  while not is_over and page < first + MAX_PAGES do
    local jobs = redis.call('ZRANGE', key('ready'), page * max_scan, (page + 1) * max_scan - 1)
    for _, job in ipairs(jobs) do
      local candidate = #line < max_scan and glance(job)
      if candidate then
        table.insert(line, candidate)
        local is_behind = candidate.priority > line[1].priority
        table.insert(is_behind and behind or candidate.warmth == 'mine' and mine or others, candidate)
      end
    end
    page, is_over = page + 1, #line >= max_scan or #jobs < max_scan
  end
  if #line > 0 or is_over then page = 0 else leave_for(SHARE_MS) end
  if #others == 0 or now - others[1].ready_ms >= prefix_patience_ms then return line end
  for _, part in ipairs({others, behind}) do
    for _, candidate in ipairs(part) do table.insert(mine, candidate) end
  end
  return mine
end

-- Whether every job of this worker has gained a token since it was claimed: then none of them kills a worker by itself.
local proven
local function is_proven()
  if proven ~= nil then return proven end
  proven = true
  for _, job in ipairs(redis.call('SMEMBERS', held)) do
    local position = select(2, last(job)) or 0
    proven = position > tonumber(redis.call('HGET', key('job:' .. job), 'claim_position') or 0)
    if not proven then break end
  end
  return proven
end

-- A job that killed one worker starts only beside proven jobs, one that killed two only alone, and one of many choices
-- where there is room for all, or nothing else. When all workers are busy, one of them is reserved: it takes no other
-- job until this one can start.
local function reserve(hash)
  local r = redis.call('HMGET', hash, 'reserved_by', 'reserved_ms')
  if r[1] and r[1] ~= worker and now - r[2] < 2 * ARGV[2] then return false end
  redis.call('HSET', hash, 'reserved_by', worker, 'reserved_ms', now)
  return true
end

-- suits -> 'take', 'skip' or 'stop' (no job behind it may overtake)
local function suits(j)
  local waited_ms = now - j.ready_ms
  local is_unlike = j.numerics_id ~= '' and j.numerics_id ~= ARGV[7]            -- '': restored by a pod
  if is_unlike and has_started(j.job) and is_patient(waited_ms, patience_ms) then return 'skip' end
  if j.warmth == 'theirs' and not has_started(j.job) and is_patient(waited_ms, prefix_patience_ms) then return 'skip' end
  if j.attempts > 0 and not empty and not (j.attempts == 1 and is_proven()) then
    if j.attempts == 1 then leave_for(PROOF_MS) end
    if waited_ms > patience_ms and reserve(j.hash) then return 'stop' end
    return 'skip'
  end
  if j.choices > free and not empty then                -- an idle worker computes them one after the other, if need be
    leave_for(PROOF_MS)
    return waited_ms > patience_ms and reserve(j.hash) and 'stop' or 'skip'
  end
  return 'take'
end

local function take(j)
  local epoch, position, tokens = last(j.job)
  if not epoch or append(j.job, (epoch + 1) .. '-0', position, tokens, 'fence', '"' .. worker .. '"') ~= 'ok' then
    retire(j.job, 'lost')
    return nil
  end
  redis.call('HSET', j.hash, 'state', 'running', 'worker', worker, 'claim_position', position, 'claimed_ms', now)
  redis.call('HINCRBY', j.hash, 'claims', 1)
  if position == 0 then redis.call('HSET', j.hash, 'weights_id', ARGV[6], 'numerics_id', ARGV[7]) end
  assign(j.entry, worker)
  redis.call('SADD', held, j.job)
  redis.call('ZREM', key('ready'), j.job)
  local virtual_time = tonumber(redis.call('HGET', key('fair'), '') or 0)
  redis.call('HSET', key('fair'), '', math.max(virtual_time, j.start_tag))
  for name in string.gmatch(j.prefix, '%S+') do
    redis.call('SET', key('prefix:' .. name), worker, 'PX', ARGV[11])
  end
  free = free - j.choices
  return describe(j.job, j.attempts > 0 and 1 or 0)
end

-- One claim takes at most an equal share per live worker, so that the first to ask leaves work to idle ones.
local line, taken, claimed = candidates(), {}, {}
local num_workers = redis.call('ZCOUNT', key('leases'), now, '+inf')
local share = math.ceil(#line / num_workers)
for _, j in ipairs(line) do
  if free <= 0 then break end
  if #taken >= share then break end
  load(j)
  local verdict = suits(j)
  if verdict == 'stop' then break end
  local row = verdict == 'take' and take(j)
  if row then
    table.insert(taken, row)
    table.insert(claimed, j.job .. ':' .. row[5])
    if row[5] == 1 then break end
    empty, proven = false, false
  end
end
-- What is left goes to others first; then, as soon as it has room, to this worker.
if #taken > 0 and redis.call('EXISTS', key('ready')) == 1 then leave_for(num_workers > 1 and SHARE_MS or 0) end
redis.call('HSET', self, 'claim', ARGV[3], 'claimed', table.concat(claimed, ' '), 'page', page)
flush_pushes()
return {look_again_ms, unpack(taken)}
