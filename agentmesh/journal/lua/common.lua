#!lua
-- (With this line a server that is out of memory refuses the script before it begins, not in the middle.)
-- What the verbs share: transaction.py, function by function. Put before each verb's script.
-- KEYS[1] prefix · ARGV[1] the verb's arguments as JSON · ARGV[2] now in ms, or '' for the server's time ·
-- ARGV[3] '1' to push messages to the broker's lists here, '0' to answer them.
-- Answers {header JSON, number of texts, texts…, then queue and text of each message not pushed}.
local P, A, PUSH = KEYS[1], cjson.decode(ARGV[1]), ARGV[3] == '1'
local NOW = tonumber(ARGV[2])
if not NOW then
  local t = redis.call('TIME')
  NOW = t[1] * 1000 + math.floor(t[2] / 1000)
end
local RESEND_MS, VERSION_TRIES, VERSION_WAIT_MS, SWEEPER_MS = 1000, 3, 5000, 3000
local sent = {}

local function int(x) return string.format('%.0f', x) end
local function hget(key, field) local v = redis.call('HGET', P .. key, field); return v or nil end
local function hnum(key, field) return tonumber(hget(key, field) or 0) end
local function hset(key, field, value) redis.call('HSET', P .. key, field, value) end
local function zadd(key, score, member) redis.call('ZADD', P .. key, int(score), member) end
local function zrem(key, member) redis.call('ZREM', P .. key, member) end
local function zupto(key, score, limit)
  return redis.call('ZRANGEBYSCORE', P .. key, '-inf', int(score), 'LIMIT', 0, limit)
end
local function members(key)
  local all = redis.call('SMEMBERS', P .. key)
  table.sort(all)
  return all
end
local function root_of(run) return string.match(run, '^[^/]*') end
local function above(run) return string.match(run, '^(.*)/[^/]*$') end

-- runs, records ---------------------------------------------------------------------------------
local function rec(run, key)
  local v = hget('st:' .. run, key)
  if v and string.sub(v, 1, 1) == '{' then return cjson.decode(v), nil end
  return nil, v
end
-- Who ends this step: 'queued' (or no lane) a worker, 'due' the clock, 'held' a person, 'child' a run of its own.
-- Entries of earlier versions have a kind alone, and its lane.
local function lane_of(r)
  if r.lane then return r.lane end
  return r.kind == 'Sleep' and 'due' or r.kind == 'Approve' and 'held' or r.kind == 'Delegate' and 'child' or 'queued'
end
local function put(run, key, r) hset('st:' .. run, key, cjson.encode(r)) end
local function event(run, text) return redis.call('RPUSH', P .. 'ev:' .. run, int(NOW) .. ' ' .. text) end
local function version(run) return redis.call('LLEN', P .. 'ev:' .. run) end
local function tail(run, after) return redis.call('LRANGE', P .. 'ev:' .. run, int(after), -1) end
local function is_open(run) return hget('run:' .. run, 'status') == 'open' end
local function is_cancelled(run)
  if redis.call('SCARD', P .. 'cancelled') == 0 then return false end
  while run do
    if redis.call('SISMEMBER', P .. 'cancelled', run) == 1 then return true end
    run = above(run)
  end
  return false
end
local function charge(run, usage)
  for name, amount in pairs(usage or {}) do
    redis.call('HINCRBYFLOAT', P .. 'run:' .. root_of(run), name, amount)
  end
end

-- entries ---------------------------------------------------------------------------------------
-- A message is sent here where broker and journal are one server and database (PUSH); else it is answered, and
-- celery/publisher.py sends it. It was rendered in celery/dispatch.py.
local function send(wire, seq, queue)
  local home, head, after_tag = string.match(wire, '^(%Z*)%z(%Z*)%z(%Z*)$')
  queue = queue or home
  local text = head .. int(seq) .. after_tag
  if PUSH then
    redis.call('LPUSH', queue, text)
  else
    sent[#sent + 1] = queue
    sent[#sent + 1] = text
  end
end
local function enqueue(unit, run, key, r)
  local seq = redis.call('HINCRBY', P .. 'meta', 'seq', 1)
  local wire = hget('wires', unit)
  local queue = string.match(wire, '^%Z*')
  if r.room then queue = queue .. '.suspects' end
  r.st, r.q, r.rs, r.rt, r.why = 'queued', queue, 0, NOW + RESEND_MS, nil
  put(run, key, r)
  zadd('q:' .. queue, seq, unit)
  redis.call('SADD', P .. 'queues', queue)
  send(wire, seq, queue)
end
local function held(unit, by)
  local root = 'run:' .. root_of(string.match(unit, '^%a|([^|]*)'))
  local n = redis.call('HINCRBY', P .. root, 'held_n', by)
  if by > 0 and n == 1 then
    hset(root, 'held_since', int(NOW))
  elseif by < 0 and n == 0 then
    redis.call('HINCRBY', P .. root, 'held_ms', int(NOW - hnum(root, 'held_since')))
  end
end
local function leave(unit, r)
  if r.st == 'queued' then
    zrem('q:' .. r.q, unit)
  elseif r.st == 'leased' then
    zrem('leased', unit)
    redis.call('SREM', P .. 'wl:' .. r.w, unit)
    if r.room and redis.call('SCARD', P .. 'wl:' .. r.w) == 0 then redis.call('HDEL', P .. 'cell', r.w) end
  elseif r.st == 'due' then
    zrem('due', unit)
  elseif r.st == 'held' then
    zrem('held', unit)
    held(unit, -1)
  end
end
local function hold(unit, run, key, r, why)
  r.st, r.why = 'held', why
  put(run, key, r)
  zadd('held', NOW, unit)
  held(unit, 1)
end
local function wait_until(unit, run, key, r, at)
  r.st = 'due'
  put(run, key, r)
  zadd('due', at, unit)
end
local function give_back(unit, run, key, r)
  leave(unit, r)
  r.lost = 1
  enqueue(unit, run, key, r)
end
-- quarantine.py
local function on_death(unit, run, key, r, in_flight, seen)
  if string.sub(unit, 1, 1) ~= 'f' then
    r.d = (r.d or 0) + 1
    if in_flight == 1 and seen then
      r.c = (r.c or 0) + 1
    elseif in_flight == 1 then
      r.x = (r.x or '') .. r.w .. '\n'
    end
    if r.d >= 2 then r.room = math.max(1, math.floor(in_flight / 4)) end
    local crashes = r.c or 0
    for worker in string.gmatch(r.x or '', '[^\n]+') do
      if hget('silent', worker) then crashes = crashes + 1 end
    end
    if crashes >= 3 and is_open(run) then
      leave(unit, r)
      r.lost = 1
      event(run, '{"e":"StepQuarantined","n":' .. (key == 'a' and '0' or key) .. ',"crashes":' .. int(crashes) .. '}')
      return hold(unit, run, key, r, 'quarantined')
    end
  end
  give_back(unit, run, key, r)
end
local function on_sign_of_life(worker)
  if redis.call('HDEL', P .. 'silent', worker) == 1 then zrem('silent_at', worker) end
end
local function clear_suspicion(r) r.d, r.c, r.x, r.room = nil, nil, nil, nil end
local function advance(run)
  local r = rec(run, 'a')
  local unit = 'a|' .. run
  if r and (r.st == 'queued' or r.st == 'leased' or r.why == 'quarantined') then return end
  if r then leave(unit, r) end
  hset('wires', unit, hget('run:' .. run, 'wire'))
  enqueue(unit, run, 'a', { st = 'new', f = 0, a = 0 })
end
local function is_in_doubt(r) return r.once and (r.st == 'leased' or r.lost == 1 or r.why == 'in_doubt') end
local function drop(unit, run, key, r, mark)
  leave(unit, r)
  if mark == 'E0' and is_in_doubt(r) then mark = 'D' end
  redis.call('HDEL', P .. 'wires', unit)
  hset('st:' .. run, key, mark)
end

-- ends ------------------------------------------------------------------------------------------
local function start_member(run, n, r)
  if lane_of(r) == 'child' then
    r.st = 'child'
    put(run, int(n), r)
    advance(run .. '/' .. int(n))
  else
    enqueue('s|' .. run .. '|' .. int(n), run, int(n), r)
  end
end
local function let_go(run, n)
  local key = int(n)
  local r = rec(run, key)
  if not r then return end
  if r.st == 'child' then
    redis.call('SADD', P .. 'cancelled', run .. '/' .. key)
  elseif r.st ~= 'leased' then
    if r.st == 'backlog' and lane_of(r) == 'child' then redis.call('SADD', P .. 'cancelled', run .. '/' .. key) end
    drop('s|' .. run .. '|' .. key, run, key, r, 'E0')
  end
end
local function close(run, first, g, why)
  g.closed = 1
  hset('ga:' .. run, int(first), cjson.encode(g))
  zrem('due', 'g|' .. run .. '|' .. int(first))
  local key = P .. 'ge:' .. run .. '|' .. int(first)
  local ended = table.concat(redis.call('LRANGE', key, 0, -1), ',')
  redis.call('DEL', key)
  event(run, '{"e":"GatherClosed","first":' .. int(first) .. ',"members":[' .. ended .. '],"why":"' .. why .. '"}')
  if g.left > 0 then
    for n = first, g.last do let_go(run, n) end
  end
  advance(run)
end
local function end_member(run, first, n, ok)
  local text = hget('ga:' .. run, int(first))
  if not text then return end
  local g = cjson.decode(text)
  if g.closed == 1 then return end
  g.left = g.left - 1
  if ok then g.ok = g.ok + 1 end
  redis.call('RPUSH', P .. 'ge:' .. run .. '|' .. int(first), int(n))
  if g.next > 0 and g.next <= g.last then
    local nxt = g.next
    g.next = g.next + 1
    local waiting = rec(run, int(nxt))
    if waiting and waiting.st == 'backlog' then start_member(run, nxt, waiting) end
  end
  hset('ga:' .. run, int(first), cjson.encode(g))
  if g.everyone == 1 then
    if g.left == 0 then close(run, first, g, 'all') end
  elseif g.ok >= g.need then
    close(run, first, g, g.left == 0 and 'all' or 'need')
  elseif g.ok + g.left < g.need then
    close(run, first, g, 'impossible')
  end
end
local function end_step(run, n, r, ok, fence)
  drop('s|' .. run .. '|' .. int(n), run, int(n), r, 'E' .. int(fence))
  if r.g > 0 then end_member(run, r.g, n, ok) end
end
local function end_delegate(run, n, up, ok)
  local r = rec(run, int(n))
  if not r or not is_open(run) then return end
  event(run, up)
  end_step(run, n, r, ok, 0)
  if r.g == 0 then advance(run) end
end
local function end_run(run, status, text, up, up_ok)
  local head = 'run:' .. run
  event(run, text)
  redis.call('HSET', P .. head, 'status', status, 'ended', int(NOW))
  zrem('open', run)
  local all = redis.call('HGETALL', P .. 'st:' .. run)
  for i = 1, #all, 2 do
    local key = all[i]
    if string.sub(all[i + 1], 1, 1) == '{' then
      local r = cjson.decode(all[i + 1])
      if r.st == 'child' then
        redis.call('SADD', P .. 'cancelled', run .. '/' .. key)
      elseif r.st ~= 'leased' or key == 'a' then
        drop(key == 'a' and ('a|' .. run) or ('s|' .. run .. '|' .. key), run, key, r, 'E0')
      end
    end
  end
  local parent = hget(head, 'parent')
  if parent then
    end_delegate(parent, hnum(head, 'n'), up, up_ok)
  else
    zadd('forget', NOW, run)
  end
  local finish = hget(head, 'finish')
  if finish then
    hset('wires', 'f|' .. run, finish)
    enqueue('f|' .. run, run, 'f', { st = 'new', f = 0, a = 0 })
  end
  redis.call('PUBLISH', P .. 'ended', run)
end

