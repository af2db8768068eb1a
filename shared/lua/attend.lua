-- attend(tag; pod, ttl_ms, max_pods, job...) -> how many of the jobs live
-- A pod names the answers that it relays: from now on they are pushed to it, and have a reader for `ttl_ms` more. A job
-- that needs no readers has no such time limit, and gets none.
local pod, until_ms, max_pods, live = ARGV[1], now_ms() + ARGV[2], tonumber(ARGV[3]), 0
for i = 4, #ARGV do
  local hash = key('job:' .. ARGV[i])
  local f = redis.call('HMGET', hash, 'pods', 'ended_ms')
  if f[1] and not f[2] then
    live = live + 1
    redis.call('ZADD', key('readers'), 'XX', 'GT', until_ms, ARGV[i])
    local pods, known = {}, false
    for other in string.gmatch(f[1], '%S+') do
      table.insert(pods, other)
      known = known or other == pod
    end
    if not known then
      table.insert(pods, pod)
      redis.call('HSET', hash, 'pods', table.concat(pods, ' ', math.max(#pods - max_pods + 1, 1)))
    end
  end
end
return live
