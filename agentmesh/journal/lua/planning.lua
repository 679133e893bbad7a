-- What a replay found is written here: steps with their entries, gathers, the children of Delegates. Follows common.lua.
-- planning --------------------------------------------------------------------------------------
local function start(run, spec, text, digest)
  for name, value in pairs(spec) do
    hset('run:' .. run, name, type(value) == 'number' and (value == math.floor(value) and int(value) or tostring(value)) or value)
  end
  redis.call('HSET', P .. 'run:' .. run, 'status', 'open', 'started', int(NOW), 'digest', digest or '')
  local first = redis.call('LINDEX', P .. 'ev:' .. run, 0)
  if not first or string.match(first, '^%d+ (.*)$') ~= text then
    if first then redis.call('DEL', P .. 'ev:' .. run, P .. 'st:' .. run) end
    event(run, text)
  end
  redis.call('SADD', P .. 'tree:' .. root_of(run), run)
  zadd('open', NOW, run)
end
local function plan_step(run, p, g)
  local key = int(p.n)
  local mark, state = hget('st:' .. run, key), p.state
  if mark and string.sub(mark, 1, 2) ~= 'D:' then return end
  local unit = 's|' .. run .. '|' .. key
  event(run, p.event)
  local r = { st = 'new', g = g and g.first or 0, f = 0, a = 0, once = p.once, rec = p.rec, limited = p.limited }
  r.lane, r.kind = p.lane, p.kind
  if mark and p.once and mark == 'D:' .. (p.digest or '') then
    r.lost = 1
    if state == 'held' then state = 'queued' end
  end
  if p.wire then hset('wires', unit, p.wire) end
  local backlog = g and g.window > 0 and p.n >= g.first + g.window
  if state == 'child' then
    local child = run .. '/' .. key
    start(child, p.child.spec, p.child.started)
    r.st = backlog and 'backlog' or 'child'
    put(run, key, r)
    if not backlog then advance(child) end
  elseif state == 'queued' and backlog then
    r.st = 'backlog'
    put(run, key, r)
  elseif state == 'queued' then
    enqueue(unit, run, key, r)
  elseif state == 'held' then
    hold(unit, run, key, r, p.held)
  elseif state == 'due' then
    wait_until(unit, run, key, r, NOW + p.due)
  else
    put(run, key, r)
  end
end
local function apply_next(run, nxt)
  local g = nxt.gather
  if g then
    hset('ga:' .. run, int(g.first), cjson.encode({
      last = g.last, need = g.need, everyone = g.everyone, left = g.last - g.first + 1, ok = 0, closed = 0,
      next = g.window > 0 and g.first + g.window or 0,
    }))
    if g.deadline > 0 then zadd('due', NOW + g.deadline, 'g|' .. run .. '|' .. int(g.first)) end
  end
  local plans = nxt.plans or {}
  local new = 0
  for _, p in ipairs(plans) do
    plan_step(run, p, g)
    if g and p.n >= g.first then new = new + 1 end
  end
  if g and new < g.last - g.first + 1 then -- opened again: imported members have ended
    for n = g.first, g.last do
      if hget('st:' .. run, int(n)) == 'E0' then end_member(run, g.first, n, true) end
    end
  end
  for _, p in ipairs(plans) do
    if p.state == 'ended' then
      local r = rec(run, int(p.n))
      if r then
        event(run, p['end'])
        end_step(run, p.n, r, false, 0)
      end
    end
  end
  local e = nxt['end']
  if e then end_run(run, e.status, e.event, e.up or '', e.up_ok == 1) end
end

-- answers ---------------------------------------------------------------------------------------
local function split(unit)
  local letter, run, n = string.match(unit, '^(%a)|([^|]*)|?(.*)$')
  return letter, run, n ~= '' and n or letter
end
local function answer(head, texts)
  local out = { cjson.encode(head), texts and #texts or 0 }
  for _, t in ipairs(texts or {}) do out[#out + 1] = t end
  for _, t in ipairs(sent) do out[#out + 1] = t end
  return out
end
local function refuse(why, detail) return answer({ no = why, detail = detail or '' }) end
