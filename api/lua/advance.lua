-- advance(batch; status, (field, value)...) -> 1, or 0 when the batch has another status by now
if redis.call('HGET', KEYS[1], 'status') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return 1
