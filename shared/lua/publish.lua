-- publish(tag; worker, lease_ms, (job, epoch, position, tokens, kind, data)...) -> {outcome...}
-- One script per engine step for the whole batch: append, push what was appended, finish what ended, renew the lease.
-- outcome: 'ok', 'refused' (the job is no longer this worker's: lease lost, cancelled, past its deadline), 'gone'.
local worker, outcomes = ARGV[1], {}
for i = 3, #ARGV, 6 do
  local job, epoch, position, tokens, kind, data = unpack(ARGV, i, i + 5)
  local outcome = append(job, epoch .. '-' .. position, position, tokens, kind, data)
  if outcome == 'ok' then
    push(job, epoch, position, tokens, kind, data)
    if kind == 'end' then retire(job, 'finished') end
  elseif outcome == 'gone' then
    retire(job, 'lost')
  elseif redis.call('HGET', key('job:' .. job), 'worker') ~= worker then  -- it may hold the job again, under a later epoch
    redis.call('SREM', key('held:' .. worker), job)
  end
  table.insert(outcomes, outcome)
end
renew(worker, ARGV[2])
flush_pushes()
return outcomes
