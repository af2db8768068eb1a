-- unreserve(key; value) -> 1, or 0 when the key has another value by now, which stays
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
