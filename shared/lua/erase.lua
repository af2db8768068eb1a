-- erase(tag; job, ttl_ms) -> 1, or nil when it is unknown
-- The job can no longer be found, and is cancelled if it runs. Its keys expire in `ttl_ms`, not at once: a pod that
-- relays it would take a missing log for one that Redis has lost, and restore it.
local hash = key('job:' .. ARGV[1])
if redis.call('EXISTS', hash) == 0 then return nil end
insist()
terminate(ARGV[1], 'cancelled', 'cancelled')
flush_pushes()
redis.call('HSET', hash, 'erased', 1)
redis.call('PEXPIRE', hash, ARGV[2])
redis.call('PEXPIRE', key('out:' .. ARGV[1]), ARGV[2])
return 1
