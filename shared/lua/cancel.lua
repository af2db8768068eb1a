-- cancel(tag; job, error code, worker) -> position of the terminal, or nil when the job has ended, is unknown, or is
-- not held by that worker; '' means any worker, or none
if ARGV[3] ~= '' and redis.call('HGET', key('job:' .. ARGV[1]), 'worker') ~= ARGV[3] then return nil end
insist()
local position = terminate(ARGV[1], ARGV[2], 'cancelled')
flush_pushes()
return position
