-- submit(tag; what accept() takes, max_queued, max_tenant_choices) -> {outcome, jobs in line}
-- outcome: 'ok', 'full' (the queue is), 'tenant_full'. Submitting the same id again changes nothing, and is 'ok'.
local backlog = redis.call('ZCARD', key('ready'))

if redis.call('EXISTS', key('job:' .. ARGV[1])) == 1 then return {'ok', backlog} end
if backlog >= tonumber(ARGV[16]) then count('refused') return {'full', backlog} end
local held = tonumber(redis.call('HGET', key('tenants'), ARGV[4]) or 0)
if held + ARGV[5] > tonumber(ARGV[17]) then count('refused') return {'tenant_full', backlog} end

accept()
return {'ok', backlog + 1}
