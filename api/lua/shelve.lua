-- shelve(record, ends, sizes; id, json, lifetime_ms, max_bytes) -> 1, or 0 when the tenant would have too much
-- Stores the record of a request; with an empty `json` it is removed. Up to 1,000 expired records are forgotten on the
-- way. Field '' of `sizes` is the sum of all sizes.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function forget(id)
  local num_bytes = redis.call('HGET', KEYS[3], id)
  if not num_bytes then return end
  redis.call('ZREM', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
  redis.call('HINCRBY', KEYS[3], '', -num_bytes)
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 1000)) do forget(id) end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1])
  forget(ARGV[1])
  return 1
end

local before = tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or 0)
local others = tonumber(redis.call('HGET', KEYS[3], '') or 0) - before
if others + #ARGV[2] > tonumber(ARGV[4]) then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], #ARGV[2], '', others + #ARGV[2])
for i = 2, 3 do
  if redis.call('PTTL', KEYS[i]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
end
return 1
