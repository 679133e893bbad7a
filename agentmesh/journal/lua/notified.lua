-- The twin of `notified` in journal/maintenance.py.
local r = rec(A.run, 'f')
if r then drop('f|' .. A.run, A.run, 'f', r, 'E0') end
return answer({ ok = 1 })
