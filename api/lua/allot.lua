-- allot(batch, allotted, output, errors; line, job, lifetime_ms) -> the line's job, this one or an earlier one; nil
-- when the line has a result, or the batch accepts none any more
-- A line is therefore never submitted under two ids.
if redis.call('HGET', KEYS[1], 'status') ~= 'in_progress' then return nil end
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 or redis.call('HEXISTS', KEYS[4], ARGV[1]) == 1 then return nil end
redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return redis.call('HGET', KEYS[2], ARGV[1])
