-- erase(tag; job, ttl_ms) -> 1, or nil when it is unknown
-- Nobody finds the job any more. If it lives it is cancelled; what is left of it goes in `ttl_ms`, not at once: whoever
-- relays it would take a log that is gone for one that Redis has lost, and put it back.
local hash = key('job:' .. ARGV[1])
if redis.call('EXISTS', hash) == 0 then return nil end
terminate(ARGV[1], 'cancelled', 'cancelled')
flush_pushes()
redis.call('HSET', hash, 'erased', 1)
redis.call('PEXPIRE', hash, ARGV[2])
redis.call('PEXPIRE', key('out:' .. ARGV[1]), ARGV[2])
return 1
