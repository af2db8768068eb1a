-- What every verb shares; prepended to each script.
--
-- KEYS[1] is the shard's tag, itself no key: it routes the script to the shard's slot, and every key begins with it.
-- A log entry has the fields position, tokens, kind, data, in this order. `position` counts header (0), deltas and the
-- terminal; `tokens` is what all choices have drawn so far: every entry carries both, so no reader has to scan.

local GROUP, QUEUED = 'workers', 'queued'
local PUBLISH = 'PUBLISH'  -- in a cluster SPUBLISH, which queue.py puts here: PUBLISH would go to every node
local ASSUMED_TOKENS = 512  -- of an answer, for the fair queue: what it really takes is settled at its end
local BAND = 2 ^ 36  -- a score in `ready`: priority · BAND + start tag, and the order of arrival in 12 bits of fraction

local function key(name) return KEYS[1] .. ':' .. name end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function count(name, by) redis.call('HINCRBY', key('counters'), name, by or 1) end

-- A full Redis refuses what may need memory, but only until a script has written something: the verbs that end jobs,
-- which frees memory, begin with this.
local function insist() redis.call('DEL', KEYS[1]) end

local function renew(worker, lease_ms) redis.call('ZADD', key('leases'), now_ms() + lease_ms, worker) end

-- last(job) -> epoch, position, tokens of the log's last entry; nil when the log is gone
local function last(job)
  local entry = redis.call('XREVRANGE', key('out:' .. job), '+', '-', 'COUNT', 1)[1]
  if not entry then return nil end
  return tonumber(string.match(entry[1], '^%d+')), tonumber(entry[2][2]), tonumber(entry[2][4])
end

-- append(...) -> 'ok', 'refused' (the log has a higher epoch, or its terminal) or 'gone' (there is no log). It is 'ok'
-- too if the log has this very entry: a publish whose reply was lost may be repeated.
local function append(job, id, position, tokens, kind, data)
  local out = key('out:' .. job)
  local added = redis.pcall('XADD', out, 'NOMKSTREAM', id,
                            'position', position, 'tokens', tokens, 'kind', kind, 'data', data)
  if type(added) == 'string' then return 'ok' end
  if not added then return 'gone' end
  local entry = redis.call('XRANGE', out, id, id)[1]
  if entry and entry[2][6] == kind and entry[2][8] == data then return 'ok' end
  if string.find(added.err, 'equal or smaller', 1, true) then return 'refused' end
  error(added.err)
end

-- Shows operators where a job is. Nothing else depends on it: deleting the stream stops nothing.
local function assign(entry, consumer) redis.pcall('XCLAIM', key('jobs'), GROUP, consumer, 0, entry, 'JUSTID') end

-- Pushes of one script go out as one message per pod: a line each, `job epoch position tokens kind data`.
local pushes = {}

local function push(job, epoch, position, tokens, kind, data)
  local pods = redis.call('HGET', key('job:' .. job), 'pods')
  if not pods then return end
  local line = string.format('%s %d %d %d %s %s', job, epoch, position, tokens, kind, data)
  for pod in string.gmatch(pods, '%S+') do
    pushes[pod] = pushes[pod] or {}
    table.insert(pushes[pod], line)
  end
end

local function flush_pushes()
  for pod, entries in pairs(pushes) do
    redis.call(PUBLISH, key('push:' .. pod), table.concat(entries, '\n'))
  end
end

-- The tenant was charged an assumed cost: its next job has the place in line that follows from the true one. Nothing is
-- to be settled where the line was empty since.
local function settle(job, tenant, prompt_tokens, cost)
  local _, _, tokens = last(job)
  if not cost or not tokens or redis.call('HEXISTS', key('fair'), tenant) == 0 then return end
  local used = tokens > 0 and prompt_tokens + tokens or 0
  redis.call('HINCRBY', key('fair'), tenant, string.format('%d', (used - cost) / 16))
end

-- The job has its terminal: takes it out of the queue, gives back what it held, starts the expiry of its log.
local function retire(job, outcome)
  local hash = key('job:' .. job)
  local f = redis.call('HMGET', hash, 'entry', 'tenant', 'choices', 'worker', 'retain_ms', 'ended_ms', 'prompt_tokens',
                       'cost')
  if not f[1] or f[6] then return end
  settle(job, f[2], f[7], f[8])
  redis.call('XACK', key('jobs'), GROUP, f[1])
  redis.call('XDEL', key('jobs'), f[1])
  redis.call('ZREM', key('ready'), job)
  redis.call('ZREM', key('deadlines'), job)
  redis.call('ZREM', key('readers'), job)
  if f[4] then redis.call('SREM', key('held:' .. f[4]), job) end
  if redis.call('HINCRBY', key('tenants'), f[2], -f[3]) <= 0 then redis.call('HDEL', key('tenants'), f[2]) end
  redis.call('HSET', hash, 'state', outcome, 'ended_ms', now_ms())
  redis.call('HDEL', hash, 'request')
  redis.call('PEXPIRE', hash, f[5])
  redis.call('PEXPIRE', key('out:' .. job), f[5])
  count(outcome)
end

-- Ends a job from outside its worker: the terminal has a higher epoch than the worker's entries, so none can follow.
-- -> position of the terminal, or nil when the job has ended or is unknown
local function terminate(job, error_code, outcome)
  local hash = key('job:' .. job)
  local f = redis.call('HMGET', hash, 'ended_ms', 'prompt_tokens', 'entry')
  if f[1] or not f[3] then return nil end
  local epoch, position, tokens = last(job)
  if epoch then
    epoch, position = epoch + 1, position + 1
    local data = string.format('{"usage":{"num_prompt_tokens":%d,"num_completion_tokens":%d},"error":"%s",'
                               .. '"ended_s":%d}', f[2], tokens, error_code, now_ms() / 1000)
    append(job, epoch .. '-' .. position, position, tokens, 'end', data)
    push(job, epoch, position, tokens, 'end', data)
  end
  retire(job, outcome)
  return position or 0
end

-- Puts a claimed job back at the head of the queue, under a fence that excludes its present worker.
-- -> 'ready'; 'dead' when its attempts are used up, 'lost' when its log is gone, nil when no worker holds it
local function requeue(job, has_failed, max_attempts, max_claims)
  local hash = key('job:' .. job)
  local f = redis.call('HMGET', hash, 'state', 'attempts', 'claims', 'claim_position', 'worker', 'entry', 'priority')
  if f[1] ~= 'running' then return nil end
  redis.call('SREM', key('held:' .. f[5]), job)
  local epoch, position, tokens = last(job)
  if not epoch then retire(job, 'lost') return 'lost' end
  local attempts = tonumber(f[2])
  if position > tonumber(f[4]) then attempts = 0 elseif has_failed then attempts = attempts + 1 end
  if attempts >= max_attempts or tonumber(f[3]) >= max_claims then
    redis.call('XADD', key('dead'), 'MAXLEN', '~', 10000, '*', 'job', job, 'worker', f[5], 'attempts', attempts,
               'claims', f[3], 'position', position, 'request', redis.call('HGET', hash, 'request'),
               'header', redis.call('XRANGE', key('out:' .. job), '-', '+', 'COUNT', 1)[1][2][8])
    terminate(job, 'job_failed', 'dead')
    return 'dead'
  end
  append(job, (epoch + 1) .. '-0', position, tokens, 'fence', '"' .. QUEUED .. '"')
  -- Its start tag may be of a busy period that is over: it would move the virtual time of this one.
  redis.call('HSET', hash, 'state', 'queued', 'attempts', attempts, 'ready_ms', now_ms(), 'start_tag', 0)
  redis.call('HDEL', hash, 'worker')
  assign(f[6], QUEUED)
  redis.call('ZADD', key('ready'), f[7] * BAND, job)
  redis.call(PUBLISH, key('wake'), '1')
  return 'ready'
end

-- Puts a job of this worker back into the queue, unless another worker holds it by now. -> as requeue()
local function hand_back(worker, job, has_failed, max_attempts, max_claims)
  if redis.call('HGET', key('job:' .. job), 'worker') == worker then
    return requeue(job, has_failed, max_attempts, max_claims)
  end
  redis.call('SREM', key('held:' .. worker), job)
end

-- accept(ARGV job, request, header, tenant, choices, pod, priority, deadline_ms, retain_ms, prompt_tokens, max_tokens,
--        tokenizer_id, weights_id, prefix, reader_ttl_ms): a new job with its log, in line. 0: it needs no reader.
local function accept()
  local job, tenant, choices, pod, priority = ARGV[1], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  local jobs = key('jobs')
  -- Written and read at once as the consumer `queued`: the group's lag stays true, its pending list is the backlog.
  local entry = redis.call('XADD', jobs, '*', 'job', job)
  local function read() return redis.pcall('XREADGROUP', 'GROUP', GROUP, QUEUED, 'STREAMS', jobs, '>') end
  if read().err then                                    -- the first job of all, or somebody has removed the group
    redis.call('XGROUP', 'CREATE', jobs, GROUP, '0')
    read()
  end

  -- Start-time fair queueing (Goyal, Vin, Cheng 1996): a tenant's next start tag is where its last job ends in virtual
  -- time. An empty line ends the busy period, and virtual time begins anew.
  if redis.call('EXISTS', key('ready')) == 0 then redis.call('DEL', key('fair')) end
  local virtual_time = tonumber(redis.call('HGET', key('fair'), '') or 0)
  local start = math.max(virtual_time, tonumber(redis.call('HGET', key('fair'), tenant) or 0))
  local cost = ARGV[10] + choices * math.min(ARGV[11], ASSUMED_TOKENS)
  redis.call('HSET', key('fair'), tenant, start + math.ceil(cost / 16))

  local now = now_ms()
  redis.call('HSET', key('job:' .. job), 'state', QUEUED, 'entry', entry, 'request', ARGV[2], 'tenant', tenant,
             'choices', choices, 'pods', pod, 'priority', priority, 'start_tag', start, 'deadline_ms', now + ARGV[8],
             'retain_ms', ARGV[9], 'prompt_tokens', ARGV[10], 'cost', cost, 'length', ARGV[10] + ARGV[11],
             'tokenizer_id', ARGV[12], 'weights_id', ARGV[13], 'prefix', ARGV[14], 'numerics_id', '', 'attempts', 0,
             'claims', 0, 'claim_position', 0, 'submitted_ms', now, 'ready_ms', now)
  redis.call('XADD', key('out:' .. job), '0-1', 'position', 0, 'tokens', 0, 'kind', 'header', 'data', ARGV[3])
  redis.call('HINCRBY', key('tenants'), tenant, choices)
  redis.call('ZADD', key('deadlines'), now + ARGV[8], job)
  if ARGV[15] ~= '0' then redis.call('ZADD', key('readers'), now + ARGV[15], job) end
  local arrival = redis.call('HINCRBY', key('counters'), 'submitted', 1)
  redis.call('ZADD', key('ready'), priority * BAND + start + (arrival % 4096) / 4096, job)
  redis.call(PUBLISH, key('wake'), '1')
end

-- Deletes all keys of a worker that holds nothing.
local function forget(worker)
  redis.call('ZREM', key('leases'), worker)
  redis.call('DEL', key('worker:' .. worker), key('held:' .. worker), key('sequence:' .. worker))
  redis.pcall('XGROUP', 'DELCONSUMER', key('jobs'), GROUP, worker)
end
