local holder, until_ms = hget('meta', 'sweeper'), hnum('meta', 'sweeper_until')
if holder and holder ~= A.worker and until_ms > NOW then
  return answer({ ok = 0, count = 0, rest = until_ms - NOW })
end
redis.call('HSET', P .. 'meta', 'sweeper', A.worker, 'sweeper_until', int(NOW + SWEEPER_MS))
-- The server's own word: a sweep sent before it died may be the first that it gets when it is back.
local boot = A.boot or (ARGV[2] == '' and string.match(redis.call('INFO', 'server'), 'run_id:(%w+)'))
if boot and boot ~= hget('meta', 'boot') then
  if hget('meta', 'boot') then hset('meta', 'grace', int(NOW + A.ttl)) end
  hset('meta', 'boot', boot)
end
local limit, empty, count = A.limit, {}, 0
for _, queue in ipairs(A.empty) do empty[queue] = true end
local queues -- those that there are once leases and timers have been seen to

-- the broker's lists are in this very store
local function look()
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

local function rest()
  for _, queue in ipairs(queues) do
    if redis.call('ZCARD', P .. 'q:' .. queue) > 0 then return 0 end
  end
  if redis.call('ZCARD', P .. 'leased') > 0 or redis.call('SCARD', P .. 'cancelled') > 0 then return 0 end
  local first = redis.call('ZRANGE', P .. 'due', 0, 0, 'WITHSCORES')
  return math.min(2000, first[1] and first[2] - NOW or 2000)
end

local function expire()
  local units = zupto('leased', NOW, limit)
  for _, unit in ipairs(units) do
    local letter, run, key = split(unit)
    local r = rec(run, key)
    if not r or r.st ~= 'leased' then
      zrem('leased', unit)
    elseif letter ~= 'f' and not is_open(run) then
      drop(unit, run, key, r, 'E0')
    else
      local hand = tonumber(hget('silent', r.w))
      if not hand then
        hand = redis.call('SCARD', P .. 'wl:' .. r.w)
        hset('silent', r.w, int(hand))
        zadd('silent_at', NOW, r.w)
      end
      died(unit, run, key, r, hand, false)
    end
  end
  return #units
end

local function wake()
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

local function again(unit, run, key, r)
  r.rs = r.rs + 1
  r.rt = NOW + 1000 * 2 ^ math.min(r.rs, 6)
  put(run, key, r)
  -- now and then to the home queue: nobody may serve the suspects
  local queue = (r.rs < 3 or r.rs % 2 == 0) and r.q or nil
  send(hget('wires', unit), redis.call('HINCRBY', P .. 'meta', 'seq', 1), queue)
end

local function resend(queue)
  local top = hnum('qmax', queue)
  local kept = hget('qsnap', queue)
  local snap, at = string.match(kept or (int(top) .. ' ' .. int(NOW)), '^(%d+) (%d+)$')
  local n = 0
  for _, unit in ipairs(zupto('q:' .. queue, empty[queue] and 2 ^ 52 or snap - 1, limit)) do
    local _, run, key = split(unit)
    local r = rec(run, key)
    if not r or r.st ~= 'queued' then
      zrem('q:' .. queue, unit)
    elseif r.rt <= NOW then
      again(unit, run, key, r)
      n = n + 1
    end
  end
  if not kept or NOW - at >= 1000 then hset('qsnap', queue, int(top) .. ' ' .. int(NOW)) end
  return n
end

-- Looked through once a sweep: a gather that is met early may cancel thousands of children of one tree.
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

local function forget(before)
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

if hnum('meta', 'grace') <= NOW then count = expire() end
count = count + wake()
queues = members('queues')
if A.look == 1 then look() end
for _, queue in ipairs(queues) do count = count + resend(queue) end
for _, run in ipairs(members('cancelled')) do count = count + cancel_below(run) end
for _, worker in ipairs(zupto('silent_at', NOW - 86400000, limit)) do heard(worker) end
if A.retain then count = count + forget(NOW - A.retain) end
local rest_ms = count == 0 and rest() or 0
if rest_ms > 0 then hset('meta', 'sweeper_until', int(NOW)) end -- whoever has work first may sweep
return answer({ ok = 1, count = count, rest = rest_ms })
