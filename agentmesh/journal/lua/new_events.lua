#!lua flags=no-writes
-- The new lines of many runs, as tree.py; so many a call that the store is never blocked for long.
-- KEYS[1] prefix · ARGV[1] how many lines a call may answer · ARGV[2] how many bytes, about · then pairs of a run and
-- how many of its lines are known. Where a run has fewer than are known it was begun anew: all its lines are new.
-- Answers {how many of the pairs were dealt with, then of each run with new lines: run, the first one's place, whether
-- there are more, their number, lines…}.
local P, lines_left, bytes_left = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local out, pairs_done = { 0 }, 0
for i = 3, #ARGV, 2 do
  if lines_left <= 0 or bytes_left <= 0 then break end
  local run, first = ARGV[i], tonumber(ARGV[i + 1])
  local key = P .. 'ev:' .. run
  local length = redis.call('LLEN', key)
  if length < first then first = 0 end
  if length > first then
    local head, at = #out, first
    for _, text in ipairs({ run, first, 0, 0 }) do out[#out + 1] = text end
    while at < length and lines_left > 0 and bytes_left > 0 do
      local texts = redis.call('LRANGE', key, at, at + math.min(math.ceil(lines_left), 64) - 1)
      for _, text in ipairs(texts) do
        out[#out + 1] = text
        bytes_left = bytes_left - #text
      end
      at, lines_left = at + #texts, lines_left - #texts
    end
    out[head + 3], out[head + 4] = at < length and 1 or 0, at - first
  end
  lines_left = lines_left - 0.25
  pairs_done = pairs_done + 1
end
out[1] = pairs_done
return out
