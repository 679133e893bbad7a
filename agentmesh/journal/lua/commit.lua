-- The twin of `commit` in journal/protocol.py; called by `_commit` in engine/engine.py.
local unit, fence = A.unit, A.fence
local _, run, key = split(unit)
local r, mark = rec(run, key)
if mark == 'E' .. int(fence) or (r and r.tf == fence) then return answer({ ok = 1, version = version(run), again = 1 }) end
charge(run, A.usage)
if not r or r.f ~= fence or not is_open(run) or is_cancelled(run) then
  redis.call('HINCRBY', P .. 'run:' .. root_of(run), 'refused', 1)
  return refuse('stale')
end
local before = version(run)
event(run, A.event)
if A.how == 'retried' or A.how == 'doubt' then r.tf = fence end
if A.how == 'retried' then
  leave(unit, r)
  r.lost = 0
  clear_suspicion(r)
  if (A.delay or 0) > 0 then wait_until(unit, run, key, r, NOW + A.delay) else enqueue(unit, run, key, r) end
elseif A.how == 'doubt' then
  leave(unit, r)
  hold(unit, run, key, r, 'in_doubt')
else
  end_step(run, tonumber(key), r, A.how == 'done', fence)
  if r.g == 0 then
    if A.next and next(A.next) and before == A.version then apply_next(run, A.next) else advance(run) end
  end
end
return answer({ ok = 1, version = version(run), conflict = before ~= A.version and 1 or 0 })
