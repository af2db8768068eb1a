-- cancel(tag; job, error code) -> position of the terminal, or nil when the job has ended or is unknown
local position = terminate(ARGV[1], ARGV[2], 'cancelled')
flush_pushes()
return position
