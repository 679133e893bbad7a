-- The twin of `begin` in journal/protocol.py.
local run = A.run
if hget('run:' .. run, 'status') then
  if hget('run:' .. run, 'digest') ~= A.digest then return refuse('exists') end
  return answer({ ok = 1, version = version(run), again = 1 })
end
for _, c in ipairs(A.carried or {}) do
  for _, fact in ipairs(c.events) do redis.call('RPUSH', P .. 'ev:' .. c.run, int(fact.at) .. ' ' .. fact.event) end
  for _, n in ipairs(c.kept) do hset('st:' .. c.run, int(n), 'E0') end
  for _, cut in ipairs(c.cut) do
    local old, mark = rec(c.from, int(cut[1]))
    if mark == 'D' or (old and is_in_doubt(old)) then hset('st:' .. c.run, int(cut[1]), 'D:' .. cut[2]) end
  end
  redis.call('SADD', P .. 'tree:' .. root_of(c.run), c.run)
end
start(run, A.spec, A.started, A.digest)
zadd('runs', NOW, run)
if next(A.next) then apply_next(run, A.next) else advance(run) end
return answer({ ok = 1, version = version(run) })
