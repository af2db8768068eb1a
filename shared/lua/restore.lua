-- restore(tag; what accept() takes, worker, lease_ms, numerics_id, epoch, (position, tokens, kind, data)...)
--   -> epoch under which the worker goes on, 0 when others do, nil when the answer has ended
-- For a Redis that lost a job, or some of what was delivered of it (a promoted replica, a truncated log): restores what
-- a pod (worker '') has delivered, or a worker has published. The entries are complete, from position 1 on.
local job, worker, epoch = ARGV[1], ARGV[16], tonumber(ARGV[19])
local hash, out, held = key('job:' .. job), key('out:' .. job), key('held:' .. worker)
local num_entries = (#ARGV - 19) / 4
local log_epoch, log_position = last(job)

-- Whether the log has the last of these entries, unchanged. Fences repeat the position before them.
local function stands()
  if not log_epoch then return false end
  if num_entries == 0 then return true end
  local tokens, _, data = unpack(ARGV, #ARGV - 2)
  local before = '+'
  while true do
    local rows = redis.call('XREVRANGE', out, before, '-', 'COUNT', 64)
    for _, row in ipairs(rows) do
      if tonumber(row[2][2]) < num_entries then return false end
      if tonumber(row[2][2]) == num_entries and row[2][6] ~= 'fence' then
        return row[2][4] == tokens and row[2][8] == data
      end
      before = '(' .. row[1]
    end
    if #rows == 0 then return false end
  end
end

local f = redis.call('HMGET', hash, 'entry', 'ended_ms', 'worker')
if f[1] and stands() then
  if f[2] then return nil end
  -- May be repeated by the worker that holds the job; 0 if others wrote to the log since, even if it holds it again.
  if worker == '' or f[3] ~= worker or log_position > num_entries then return 0 end
  redis.call('SADD', held, job)
  renew(worker, ARGV[17])
  return log_epoch
end

-- Above every epoch written here before; what the log holds now was never delivered.
if f[1] then retire(job, 'lost') end
redis.call('DEL', hash, out)
accept()
epoch = math.max(log_epoch or 0, epoch) + 1
redis.call('XADD', out, epoch .. '-0', 'position', 0, 'tokens', 0, 'kind', 'fence', 'data', '"' .. QUEUED .. '"')
for i = 20, #ARGV, 4 do
  redis.call('XADD', out, epoch .. '-' .. ARGV[i], 'position', ARGV[i], 'tokens', ARGV[i + 1], 'kind', ARGV[i + 2],
             'data', ARGV[i + 3])
end
redis.call('HSET', hash, 'numerics_id', ARGV[18])
count('restored')
if worker == '' then
  redis.call('ZADD', key('ready'), ARGV[7] * BAND, job)                 -- the head of the line: it was there before
  return 0
end
redis.call('ZREM', key('ready'), job)
redis.call('HSET', hash, 'state', 'running', 'worker', worker, 'claim_position', num_entries, 'claimed_ms', now_ms())
redis.call('HINCRBY', hash, 'claims', 1)
assign(redis.call('HGET', hash, 'entry'), worker)
redis.call('SADD', held, job)
renew(worker, ARGV[17])
return epoch
