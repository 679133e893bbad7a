-- The twin of `signal` in journal/maintenance.py.
local run, kind = A.run, A.kind
local status = hget('run:' .. run, 'status')
if not status then return refuse('unknown') end
if status ~= 'open' then return refuse('ended', status) end

local function raise_limits()
  local root = root_of(run)
  event(root, A.event)
  for name, value in pairs(A.limits) do
    if value == cjson.null then -- no ceiling
      redis.call('HDEL', P .. 'run:' .. root, 'lim_' .. name)
    else
      hset('run:' .. root, 'lim_' .. name, tostring(value))
    end
  end
  for _, member in ipairs(members('tree:' .. root)) do
    local keys = redis.call('HKEYS', P .. 'st:' .. member)
    table.sort(keys)
    for _, key in ipairs(keys) do
      local r = rec(member, key)
      if r and r.st == 'held' and string.sub(r.why, 1, 6) == 'limit:' then
        local unit = 's|' .. member .. '|' .. key
        leave(unit, r)
        enqueue(unit, member, key, r)
      end
    end
  end
  advance(root)
end

local function signal_step()
  local n, key = A.n, int(A.n)
  local unit = 's|' .. run .. '|' .. key
  local r, mark = rec(run, key)
  if not r or r.st ~= 'held' then return refuse('not_waiting', mark and 'ended' or '') end
  local is_decision = lane_of(r) == 'held' -- a person ends it; a worker cannot
  local may
  if kind == 'Approved' or kind == 'Denied' then
    may = r.why == 'approve'
  elseif kind == 'StepResolved' then
    may = r.why == 'in_doubt' or r.why == 'quarantined' or (is_decision and r.why ~= 'approve' and A.action ~= 'retry')
  else -- StepRevived
    may = r.why ~= 'approve' and r.why ~= 'in_doubt' and not is_decision
  end
  if not may then return refuse('not_waiting', r.why) end
  event(run, A.event)
  local ends = kind == 'Denied' or (kind == 'Approved' and is_decision) or A.action == 'done' or A.action == 'failed'
  if ends then
    end_step(run, n, r, kind ~= 'Denied' and A.action ~= 'failed', 0)
    if r.g == 0 then advance(run) end
  else
    leave(unit, r)
    r.lost = (kind == 'StepRevived' and r.once == 1) and 1 or 0
    clear_suspicion(r)
    enqueue(unit, run, key, r)
  end
  return answer({ ok = 1, version = version(run) })
end

if kind == 'RunCancelled' then
  redis.call('SADD', P .. 'cancelled', run)
  end_run(run, 'cancelled', A.event, A.up or '', false)
elseif kind == 'LimitRaised' then
  raise_limits()
elseif A.n == 0 then
  local r = rec(run, 'a')
  if not r or r.st ~= 'held' then return refuse('not_waiting') end
  if kind ~= 'StepRevived' and A.action ~= 'retry' then return refuse('run', r.why) end
  event(run, A.event)
  r.why = ''
  put(run, 'a', r)
  advance(run)
else
  return signal_step()
end
return answer({ ok = 1, version = version(run) })
