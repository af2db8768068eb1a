-- submit(tag; job, request, header, tenant, choices, pod, priority, deadline_ms, retain_ms, prompt_tokens, cost,
--        tokenizer_id, weights_id, prefix, max_queued, max_tenant_choices, reader_ttl_ms)
--   -> {outcome, jobs in line}
-- outcome: 'ok', 'full' (the line is), 'tenant_full'. Submitting the same id again changes nothing and is 'ok'.
local job, request, header, tenant, choices = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local hash, jobs = key('job:' .. job), key('jobs')
local backlog = redis.call('ZCARD', key('ready'))

if redis.call('EXISTS', hash) == 1 then return {'ok', backlog} end
if backlog >= tonumber(ARGV[15]) then count('refused') return {'full', backlog} end
local held = tonumber(redis.call('HGET', key('tenants'), tenant) or 0)
if held + choices > tonumber(ARGV[16]) then count('refused') return {'tenant_full', backlog} end

-- Written and read at once as the consumer `queued`: the group's lag stays true and its pending list is the backlog.
if redis.call('EXISTS', jobs) == 0 then redis.call('XGROUP', 'CREATE', jobs, GROUP, '0', 'MKSTREAM') end
local entry = redis.call('XADD', jobs, '*', 'job', job)
redis.call('XREADGROUP', 'GROUP', GROUP, QUEUED, 'COUNT', 1, 'STREAMS', jobs, '>')

-- Start-time fair queueing (Goyal, Vin, Cheng 1996): a tenant's next start tag is where its last job ends in virtual time.
-- An empty line ends the busy period, and virtual time begins anew.
if backlog == 0 then redis.call('DEL', key('fair')) end
local virtual_time = tonumber(redis.call('HGET', key('fair'), '') or 0)
local start = math.max(virtual_time, tonumber(redis.call('HGET', key('fair'), tenant) or 0))
redis.call('HSET', key('fair'), tenant, start + math.ceil(ARGV[11] / 16))

local now = now_ms()
redis.call('HSET', hash, 'state', QUEUED, 'entry', entry, 'request', request, 'tenant', tenant, 'choices', choices,
           'pods', ARGV[6], 'priority', ARGV[7], 'start_tag', start, 'deadline_ms', now + ARGV[8], 'retain_ms', ARGV[9],
           'prompt_tokens', ARGV[10], 'tokenizer_id', ARGV[12], 'weights_id', ARGV[13], 'numerics_id', '',
           'prefix', ARGV[14],
           'attempts', 0, 'claims', 0, 'claim_position', 0, 'submitted_ms', now, 'ready_ms', now)
redis.call('XADD', key('out:' .. job), '0-1', 'position', 0, 'tokens', 0, 'kind', 'header', 'data', header)
redis.call('HINCRBY', key('tenants'), tenant, choices)
redis.call('ZADD', key('deadlines'), now + ARGV[8], job)
redis.call('ZADD', key('readers'), now + ARGV[17], job)
local arrival = redis.call('HINCRBY', key('counters'), 'submitted', 1)
redis.call('ZADD', key('ready'), ARGV[7] * BAND + start + (arrival % 4096) / 4096, job)
redis.call('PUBLISH', key('wake'), '1')
return {'ok', backlog + 1}
