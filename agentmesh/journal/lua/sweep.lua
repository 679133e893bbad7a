-- The twin of `sweep` in journal/maintenance.py.
local holder, until_ms = hget('meta', 'sweeper'), hnum('meta', 'sweeper_until')
if holder and holder ~= A.worker and until_ms > NOW then
  return answer({ ok = 0, count = 0, rest = until_ms - NOW })
end
redis.call('HSET', P .. 'meta', 'sweeper', A.worker, 'sweeper_until', int(NOW + SWEEPER_MS))
-- Asked of the server itself: a sweep that was sent before it died may be the first that it gets after its restart.
local boot = A.boot or (ARGV[2] == '' and string.match(redis.call('INFO', 'server'), 'run_id:(%w+)'))
if boot and boot ~= hget('meta', 'boot') then
  if hget('meta', 'boot') then hset('meta', 'grace', int(NOW + A.ttl)) end
  hset('meta', 'boot', boot)
end
local limit, empty, count = A.limit, {}, 0
for _, queue in ipairs(A.empty) do empty[queue] = true end
local queues -- those that exist once leases and timers have been handled

-- The broker's lists are in this store.
local function long_empty()
  local looked = hnum('meta', 'looked')
  if NOW < looked or NOW > looked + SWEEPER_MS + 1000 then redis.call('DEL', P .. 'empty') end
  hset('meta', 'looked', int(NOW))
  for _, queue in ipairs(queues) do
    local since = hnum('empty', queue)
    if redis.call('LLEN', queue) > 0 then
      redis.call('HDEL', P .. 'empty', queue)
    elseif since == 0 then
      hset('empty', queue, int(NOW))
    elseif NOW - since >= 1000 then
      empty[queue] = true
    end
  end
end

local function idle_ms()
  for _, queue in ipairs(queues) do
    if redis.call('ZCARD', P .. 'q:' .. queue) > 0 then return 0 end
  end
  if redis.call('ZCARD', P .. 'leased') > 0 or redis.call('SCARD', P .. 'cancelled') > 0 then return 0 end
  local first = redis.call('ZRANGE', P .. 'due', 0, 0, 'WITHSCORES')
  return math.min(2000, first[1] and first[2] - NOW or 2000)
end

local function expire_leases()
  local units = zupto('leased', NOW, limit)
  for _, unit in ipairs(units) do
    local letter, run, key = split(unit)
    local r = rec(run, key)
    if not r or r.st ~= 'leased' then
      zrem('leased', unit)
    elseif letter ~= 'f' and not is_open(run) then
      drop(unit, run, key, r, 'E0')
    else
      local in_flight = tonumber(hget('silent', r.w))
      if not in_flight then
        in_flight = redis.call('SCARD', P .. 'wl:' .. r.w)
        hset('silent', r.w, int(in_flight))
        zadd('silent_at', NOW, r.w)
      end
      on_death(unit, run, key, r, in_flight, false)
    end
  end
  return #units
end

local function fire_due()
  local units = zupto('due', NOW, limit)
  for _, unit in ipairs(units) do
    local letter, run, key = split(unit)
    zrem('due', unit)
    local r = letter ~= 'g' and rec(run, key)
    if letter == 'g' then
      local text = hget('ga:' .. run, key)
      local g = text and cjson.decode(text)
      if g and g.closed ~= 1 and is_open(run) then close(run, tonumber(key), g, 'deadline') end
    elseif r and is_open(run) then
      if lane_of(r) == 'due' then
        event(run, '{"e":"Woken","n":' .. key .. '}')
        end_step(run, tonumber(key), r, true, 0)
        if r.g == 0 then advance(run) end
      else
        enqueue(unit, run, key, r)
      end
    end
  end
  return #units
end

local function resend_entry(unit, run, key, r)
  r.rs = r.rs + 1
  r.rt = NOW + 1000 * 2 ^ math.min(r.rs, 6)
  put(run, key, r)
  -- sometimes to the home queue: perhaps no worker serves the suspects
  local queue = (r.rs < 3 or r.rs % 2 == 0) and r.q or nil
  send(hget('wires', unit), redis.call('HINCRBY', P .. 'meta', 'seq', 1), queue)
end

local function resend(queue)
  local top = hnum('qmax', queue)
  local snapshot = hget('qsnap', queue)
  local snap, at = string.match(snapshot or (int(top) .. ' ' .. int(NOW)), '^(%d+) (%d+)$')
  local n = 0
  for _, unit in ipairs(zupto('q:' .. queue, empty[queue] and 2 ^ 52 or snap - 1, limit)) do
    local _, run, key = split(unit)
    local r = rec(run, key)
    if not r or r.st ~= 'queued' then
      zrem('q:' .. queue, unit)
    elseif r.rt <= NOW then
      resend_entry(unit, run, key, r)
      n = n + 1
    end
  end
  if not snapshot or NOW - at >= 1000 then hset('qsnap', queue, int(top) .. ' ' .. int(NOW)) end
  return n
end

-- Read once a sweep: a gather that closes early may cancel thousands of children of one tree.
local trees = {}
local function below(run)
  local root = root_of(run)
  if not trees[root] then
    trees[root] = {}
    for _, member in ipairs(members('tree:' .. root)) do
      local at = member
      while at do
        trees[root][at] = trees[root][at] or {}
        table.insert(trees[root][at], member)
        at = above(at)
      end
    end
  end
  return trees[root][run] or {}
end

local function cancel_below(run)
  local n, more = 0, false
  for _, member in ipairs(below(run)) do
    if is_open(member) then
      if n >= limit then more = true break end
      n = n + 1
      local error = '{"type":"DelegateFailed","message":"run ' .. member .. ' was cancelled","child":"' .. member .. '"}'
      local up = '{"e":"StepFailed","n":' .. (string.match(member, '/([^/]*)$') or '') .. ',"error":' .. error .. '}'
      end_run(member, 'cancelled', '{"e":"RunCancelled","by":"parent"}', up, false)
    end
  end
  if not more then redis.call('SREM', P .. 'cancelled', run) end
  return n
end

local function delete_expired(before)
  local roots = zupto('forget', before, limit)
  for _, root in ipairs(roots) do
    for _, run in ipairs(members('tree:' .. root)) do
      for _, first in ipairs(redis.call('HKEYS', P .. 'ga:' .. run)) do redis.call('UNLINK', P .. 'ge:' .. run .. '|' .. first) end
      redis.call('UNLINK', P .. 'run:' .. run, P .. 'st:' .. run, P .. 'ga:' .. run, P .. 'ev:' .. run)
    end
    for _, key in ipairs(redis.call('SMEMBERS', P .. 'blobs:' .. root)) do redis.call('UNLINK', key) end
    redis.call('UNLINK', P .. 'tree:' .. root, P .. 'blobs:' .. root, P .. 'live:' .. root)
    zrem('runs', root)
    zrem('forget', root)
  end
  return #roots
end

if hnum('meta', 'grace') <= NOW then count = expire_leases() end
count = count + fire_due()
queues = members('queues')
if A.look == 1 then long_empty() end
for _, queue in ipairs(queues) do count = count + resend(queue) end
for _, run in ipairs(members('cancelled')) do count = count + cancel_below(run) end
for _, worker in ipairs(zupto('silent_at', NOW - 86400000, limit)) do on_sign_of_life(worker) end
if A.retain then count = count + delete_expired(NOW - A.retain) end
local rest_ms = count == 0 and idle_ms() or 0
if rest_ms > 0 then hset('meta', 'sweeper_until', int(NOW)) end -- any other worker may sweep meanwhile
return answer({ ok = 1, count = count, rest = rest_ms })
