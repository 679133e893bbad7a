-- The twin of `renew` in journal/maintenance.py.
local lost = {}
on_sign_of_life(A.worker)
for _, lease in ipairs(A.leases) do
  local unit, fence = lease[1], lease[2]
  local letter, run, key = split(unit)
  local r = rec(run, key)
  local mine = r and r.st == 'leased' and r.f == fence
  if mine and (letter == 'f' or (is_open(run) and not is_cancelled(run))) then
    zadd('leased', NOW + A.ttl, unit)
  else
    lost[#lost + 1] = unit
  end
end
return answer({ ok = 1 }, lost)
