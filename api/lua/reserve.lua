-- reserve(key; value, lifetime_ms) -> the value stored under the key, this one or an earlier one, and the ms left of
-- its lifetime
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {ARGV[1], tonumber(ARGV[2])} end
return {redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])}
