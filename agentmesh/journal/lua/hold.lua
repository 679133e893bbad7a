-- The twin of `hold` in journal/protocol.py.
local _, run, key = split(A.unit)
local r = rec(run, key)
if not r or r.f ~= A.fence or not is_open(run) then return refuse('stale') end
if r.st == 'leased' then
  leave(A.unit, r)
  hold(A.unit, run, key, r, A.why)
end
return answer({ ok = 1 })
