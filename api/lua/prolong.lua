-- prolong(files, pieces; file, lifetime_ms) -> 1, or 0 when there is no such file any more
-- Never shortens its lifetime, and makes no file of one that is deleted meanwhile.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HGET', KEYS[1], ARGV[1]) or ''
local num_bytes, ends, rest = string.match(known, '^(%d+) (%d+) (.*)$')
if not ends or tonumber(ends) <= now then return 0 end

local expires = math.max(now + ARGV[2], tonumber(ends))
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %d %s', num_bytes, expires, rest))
redis.call('PEXPIREAT', KEYS[2], expires)
if redis.call('PTTL', KEYS[1]) < expires - now then redis.call('PEXPIREAT', KEYS[1], expires) end
return 1
