-- release(tag; worker, max_attempts, max_claims, has_failed, job...) -> number of jobs back in the queue
-- A worker that leaves hands its jobs over at once; this counts as an attempt only if it failed at them. Without jobs:
-- all that it holds, and its lease ends.
local worker, has_failed, jobs = ARGV[1], ARGV[4] == '1', {unpack(ARGV, 5)}
local leaves = #jobs == 0
if leaves then jobs = redis.call('SMEMBERS', key('held:' .. worker)) end
local released = 0
for _, job in ipairs(jobs) do
  if hand_back(worker, job, has_failed, tonumber(ARGV[2]), tonumber(ARGV[3])) == 'ready' then released = released + 1 end
end
if leaves then forget(worker) end
count('released', released)
flush_pushes()
return released
