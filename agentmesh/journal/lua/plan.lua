-- The twin of `plan` in journal/protocol.py.
local run = A.run
local r, mark = rec(run, 'a')
if mark == 'E' .. int(A.fence) then return answer({ ok = 1, version = version(run), again = 1 }) end
if not r or r.f ~= A.fence then return refuse('stale') end
if not is_open(run) then
  drop('a|' .. run, run, 'a', r, 'E0')
  return refuse('ended')
end
if is_cancelled(run) then return refuse('cancelled') end
if version(run) ~= A.version then
  return answer({ no = 'conflict', version = version(run) }, tail(run, A.version))
end
drop('a|' .. run, run, 'a', r, 'E' .. int(A.fence))
apply_next(run, A.next)
return answer({ ok = 1, version = version(run) })
