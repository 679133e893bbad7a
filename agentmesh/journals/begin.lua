local run = A.run
if hget('run:' .. run, 'status') then
  if hget('run:' .. run, 'digest') ~= A.digest then return refuse('exists') end
  return answer({ ok = 1, version = version(run), again = 1 })
end
start(run, A.spec, A.started, A.digest)
zadd('runs', NOW, run)
if next(A.next) then follow(run, A.next) else advance(run) end
return answer({ ok = 1, version = version(run) })
