-- release(tag; worker, max_attempts, max_claims, job...) -> jobs that are back in line
-- A worker that leaves hands its jobs over at once; that never counts as a lost lease. Without jobs: all it holds,
-- and its lease ends.
local worker, jobs = ARGV[1], {unpack(ARGV, 4)}
local leaves = #jobs == 0
if leaves then jobs = redis.call('SMEMBERS', key('held:' .. worker)) end
local released = 0
for _, job in ipairs(jobs) do
  local mine = redis.call('HGET', key('job:' .. job), 'worker') == worker
  if mine and requeue(job, false, tonumber(ARGV[2]), tonumber(ARGV[3])) == 'ready' then released = released + 1 end
end
if leaves then forget(worker) end
count('released', released)
flush_pushes()
return released
