-- keep(files, pieces; file, num_bytes, lifetime_ms, rest, max_bytes, max_files, number, piece)
--   -> {'ok', the ms at which it expires}, {'bytes'} or {'files'} when the tenant would have too much; 0 bounds nothing
-- Stores the facts of a file, with one more piece of it unless `number` is empty. Never shortens its lifetime.
-- Forgets files that have expired.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expires, sum, count = now + ARGV[3], tonumber(ARGV[2]), 1
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local num_bytes, ends = string.match(all[i + 1], '^(%d+) (%d+) ')
  if all[i] == ARGV[1] then expires = math.max(expires, tonumber(ends))
  elseif tonumber(ends) <= now then redis.call('HDEL', KEYS[1], all[i])
  else sum, count = sum + num_bytes, count + 1 end
end
if ARGV[5] ~= '0' and sum > tonumber(ARGV[5]) then return {'bytes'} end
if ARGV[6] ~= '0' and count > tonumber(ARGV[6]) then return {'files'} end

redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %d %s', ARGV[2], expires, ARGV[4]))
if ARGV[7] ~= '' then redis.call('HSET', KEYS[2], ARGV[7], ARGV[8]) end
redis.call('PEXPIREAT', KEYS[2], expires)
if redis.call('PTTL', KEYS[1]) < expires - now then redis.call('PEXPIREAT', KEYS[1], expires) end
return {'ok', expires}
