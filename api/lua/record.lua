-- record(batch, allotted, this, other; line, text, lifetime_ms, counter, number...)
--   -> 1, or 0 when the line has a result already, in this file or the other, or the batch takes none any more
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'in_progress' and status ~= 'cancelling' then return 0 end
if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 1 or redis.call('HSETNX', KEYS[3], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
for i = 4, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
