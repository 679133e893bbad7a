#!lua flags=no-writes
-- The open entries of a run's tree, as tree.py; so many a call that the store is never blocked for long.
-- KEYS[1] prefix · ARGV[1] how many records and lines a call may look at · ARGV[2] how many of a run's newest lines
-- are searched for a plan · then pairs of a run and a cursor into its records, what comes next at the end.
-- Answers {entries that move, length of the pairs that are left, those pairs…, then run, key, why and the line that
-- planned the step, of each entry that waits; the line is empty where the search did not reach it}.
local P, budget, most_lines = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local todo, waiting, moving = {}, {}, 0
for i = 3, #ARGV do todo[#todo + 1] = ARGV[i] end

-- The newest steps come last, and those are what a run waits for: search from the end.
local function planned(run, held, count)
  local key, lines, searched = P .. 'ev:' .. run, {}, 0
  local last = redis.call('LLEN', key) - 1
  while count > 0 and last >= 0 and searched < most_lines do
    local texts = redis.call('LRANGE', key, math.max(0, last - 63), last)
    for i = #texts, 1, -1 do
      local n = string.match(texts[i], '^%d+ {%s*"e":%s*"StepPlanned",%s*"n":%s*(%d+)')
        or string.match(texts[i], '^%d+ {"e":"StepPlanned","blob":"%x+","n":(%d+)')
      if n and held[n] and not lines[n] then
        lines[n] = texts[i]
        count = count - 1
      end
    end
    last, searched = last - #texts, searched + #texts
  end
  budget = budget - searched
  return lines
end

while #todo > 0 and budget > 0 do
  local cursor, run = table.remove(todo), table.remove(todo)
  local page = redis.call('HSCAN', P .. 'st:' .. run, cursor, 'COUNT', 250)
  local fields, held, count = page[2], {}, 0
  budget = budget - 1 - #fields / 2
  if page[1] ~= '0' then
    todo[#todo + 1] = run
    todo[#todo + 1] = page[1]
  end
  for i = 1, #fields, 2 do
    local key, text = fields[i], fields[i + 1]
    local r = string.sub(text, 1, 1) == '{' and cjson.decode(text) or {}
    local why = r.why and r.why ~= '' and r.why
    if r.st == 'child' then
      todo[#todo + 1] = run .. '/' .. key
      todo[#todo + 1] = '0'
    elseif why and (r.st == 'held' or r.st == 'due') then
      held[key] = why
      if string.match(key, '^%d+$') then count = count + 1 end
    elseif not why and (r.st == 'queued' or r.st == 'leased' or r.st == 'due') then
      moving = moving + 1
    end
  end
  local lines = planned(run, held, count)
  for key, why in pairs(held) do
    for _, text in ipairs({ run, key, why, lines[key] or '' }) do waiting[#waiting + 1] = text end
  end
end

local out = { moving, #todo }
for _, text in ipairs(todo) do out[#out + 1] = text end
for _, text in ipairs(waiting) do out[#out + 1] = text end
return out
