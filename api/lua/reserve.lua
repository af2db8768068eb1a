-- reserve(key; value, lifetime_ms) -> the value that stands there, this one or that of whoever came first, and the ms
-- that are left of its life
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {ARGV[1], tonumber(ARGV[2])} end
return {redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])}
