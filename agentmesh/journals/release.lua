local units = members('wl:' .. A.worker)
for _, unit in ipairs(units) do
  local _, run, key = split(unit)
  local r = rec(run, key)
  if r and r.st == 'leased' and r.w == A.worker then
    if A.crashed == 1 then died(unit, run, key, r, #units, true) else give_back(unit, run, key, r) end
  end
end
for _, queue in ipairs(A.queues) do
  hset('qsnap', queue, int(hnum('qmax', queue)) .. ' ' .. int(NOW))
end
return answer({ ok = 1, count = #units })
