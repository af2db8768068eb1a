-- leave(tag; pod, grace_ms, job) -> 'read' (by others), 'waits' (grace_ms for a reader), 'cancelled', or 'none' when the
-- job has ended, is unknown, or goes on without readers.
-- A pod whose channel has no subscriber has died, and its readers are gone.
local NUMSUB = PUBLISH == 'SPUBLISH' and 'SHARDNUMSUB' or 'NUMSUB'
local pod, grace_ms, job = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local hash = key('job:' .. job)
local pods = redis.call('HGET', hash, 'pods')
if not pods or not redis.call('ZSCORE', key('readers'), job) then return 'none' end
insist()
local others, outcome = {}, 'waits'
for other in string.gmatch(pods, '%S+') do
  if other ~= pod then
    table.insert(others, other)
    if redis.call('PUBSUB', NUMSUB, key('push:' .. other))[2] > 0 then outcome = 'read' end
  end
end
redis.call('HSET', hash, 'pods', table.concat(others, ' '))
if outcome == 'read' then return outcome end
if grace_ms == 0 then
  terminate(job, 'cancelled', 'cancelled')
  flush_pushes()
  return 'cancelled'
end
redis.call('ZADD', key('readers'), now_ms() + grace_ms, job)
return outcome
