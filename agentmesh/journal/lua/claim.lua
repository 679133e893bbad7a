-- The twin of `claim` in journal/protocol.py.
local unit = A.unit
local letter, run, key = split(unit)
local r, mark = rec(run, key)
if not r then return refuse(mark and 'ended' or 'unknown') end
local head = redis.call('HMGET', P .. 'run:' .. run, 'status', 'crew', 'version')
if letter ~= 'f' and head[1] ~= 'open' then
  drop(unit, run, key, r, 'E0')
  return refuse('ended')
end
if letter ~= 'f' and is_cancelled(run) then return refuse('cancelled') end

local function claim_reply()
  local events = tail(run, A.version)
  local doubt = (r.once and r.lost == 1) and 1 or 0
  return answer({ ok = 1, fence = r.f, attempt = r.a, doubt = doubt, limit = r.limit or '', version = version(run) }, events)
end
if r.st == 'leased' then
  if r.tok == A.token then return claim_reply() end
  return refuse('busy')
end
if r.st ~= 'queued' then return refuse(r.st == 'held' and 'held' or 'later') end

if A.apart and r.room then return refuse('apart') end
-- a suspect shares its worker with few, and with suspects alone
local cell = tonumber(hget('cell', A.worker))
if r.room or cell then
  local in_flight = redis.call('SCARD', P .. 'wl:' .. A.worker)
  local most = r.room and cell and math.min(r.room, cell) or 1
  if in_flight > 0 and in_flight >= most then return refuse('room', int(most)) end
  if in_flight > 0 and not (r.room and cell) then return refuse('room', '1') end
end
-- why this worker may not claim this entry now
if head[2] ~= A.crew or head[3] ~= A.crew_version then
  leave(unit, r)
  r.v = (r.v or 0) + 1
  if r.v <= VERSION_TRIES or r.v % 2 == 1 then
    enqueue(unit, run, key, r)
  else
    r.why = 'version:' .. head[2] .. ' ' .. head[3]
    wait_until(unit, run, key, r, NOW + math.min(VERSION_WAIT_MS, 125 * 2 ^ math.min(r.v - VERSION_TRIES, 6)))
  end
  return refuse('version', head[2] .. ' ' .. head[3])
end
local function limit_reached(root)
  for _, pair in ipairs({ { 'turns', 'turns' }, { 'tokens', 'tokens' }, { 'cost_usd', 'usd' } }) do
    local limit = hget(root, 'lim_' .. pair[1])
    if limit and hnum(root, pair[2]) >= tonumber(limit) then return pair[1] end
  end
  local seconds = hget(root, 'lim_seconds')
  if seconds then
    local waited = hnum(root, 'held_ms') + (hnum(root, 'held_n') > 0 and NOW - hnum(root, 'held_since') or 0)
    if NOW - hnum(root, 'started') - waited >= tonumber(seconds) * 1000 then return 'seconds' end
  end
end
if r.limited == 1 or (r.kind == 'Ask' and not r.lane) then -- of earlier versions, an Ask
  local root = 'run:' .. root_of(run)
  local limit = limit_reached(root)
  if limit and hget(root, 'on_limit') == 'fail' then
    r.limit = limit
  elseif limit then
    leave(unit, r)
    hold(unit, run, key, r, 'limit:' .. limit)
    return refuse('held', 'limit:' .. limit)
  end
end
if r.once and r.lost == 1 and not r.rec then
  leave(unit, r)
  event(run, '{"e":"StepInDoubt","n":' .. key .. ',"attempt":' .. int(r.a) .. '}')
  hold(unit, run, key, r, 'in_doubt')
  return refuse('held', 'in_doubt')
end
if A.rate_ms then
  local queue = string.gsub(r.q, '%.suspects$', '')
  local at = hnum('rate', queue)
  if at > NOW + A.rate_ms * A.burst then
    leave(unit, r)
    wait_until(unit, run, key, r, at - A.rate_ms * A.burst)
    return refuse('later', 'rate')
  end
  hset('rate', queue, int(math.max(at, NOW) + A.rate_ms))
end

local seq = tonumber(redis.call('ZSCORE', P .. 'q:' .. r.q, unit) or 0)
if seq > hnum('qmax', r.q) then hset('qmax', r.q, int(seq)) end
leave(unit, r)
r.v = nil
r.st, r.f, r.tok, r.w, r.a = 'leased', redis.call('HINCRBY', P .. 'meta', 'fence', 1), A.token, A.worker, r.a + 1
put(run, key, r)
zadd('leased', NOW + A.ttl, unit)
redis.call('SADD', P .. 'wl:' .. A.worker, unit)
if r.room then hset('cell', A.worker, int(math.min(r.room, cell or r.room))) end
return claim_reply()
