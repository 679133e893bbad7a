-- The twin of `release` in journal/maintenance.py.
local units = members('wl:' .. A.worker)
local function is_below(w) return string.sub(w or '', 1, #A.worker + 1) == A.worker .. '/' end
if A.below == 1 then
  for _, unit in ipairs(redis.call('ZRANGE', P .. 'leased', 0, -1)) do
    local _, run, key = split(unit)
    local r = rec(run, key)
    if r and is_below(r.w) then units[#units + 1] = unit end
  end
end
for _, unit in ipairs(units) do
  local _, run, key = split(unit)
  local r = rec(run, key)
  if r and r.st == 'leased' and (r.w == A.worker or is_below(r.w)) then
    if A.crashed == 1 then on_death(unit, run, key, r, #units, true) else give_back(unit, run, key, r) end
  end
end
if hget('meta', 'sweeper') == A.worker then hset('meta', 'sweeper_until', int(NOW)) end -- the next worker to ask becomes the sweeper
for _, queue in ipairs(A.queues) do
  hset('qsnap', queue, int(hnum('qmax', queue)) .. ' ' .. int(NOW))
end
return answer({ ok = 1, count = #units })
