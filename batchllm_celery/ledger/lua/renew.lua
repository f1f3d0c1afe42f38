-- renew.lua: all rows of a batch go, so that a new generation of its input is fed. What was spent
-- stays counted; kept results stay until the new generation is sealed.
--
-- ARGV     1 'look' to change nothing, 'renew' where nothing is held, 'force' although items are
--          held: their processes are dead
-- returns  {items held, what their processes said last}; renewed where that is 0, or by force
--#include batch.lua
if not load_meta() then return false end
local held = call('HGETALL', HELD)
local calling, said = 0, {}
for n = 1, #held, 2 do
  if string.sub(held[n + 1], 1, 1) == CALLING then calling = calling + 1 end
  said[string.sub(held[n + 1], 20)] = true
end
if ARGV[1] == 'look' or (#held > 0 and ARGV[1] ~= 'force') then
  local words = {}
  for process in pairs(said) do
    words[#words + 1] = process .. ' ' .. (call('HGET', PROCS, process) or '')
  end
  table.sort(words)
  return {#held / 2, table.concat(words, '\n')}
end
for _, key in ipairs({ITEM, FP, READY, HELD, ATTEMPTS, DONE, FAILED, STOPPED, CALLS,
                       BLOB, USES, REFS}) do
  call('UNLINK', key)
end
local last = meta.keep == 1 and call('XREVRANGE', OUT, '+', '-', 'COUNT', 1)[1]
if last then
  call('HSET', META, 'superseded', last[1])
else
  call('UNLINK', OUT)
end
meta.read_count, meta.read_bytes = meta.out_count, meta.out_bytes
for _, name in ipairs({'fed', 'ok', 'failed', 'stopped', 'item_bytes', 'kept_bytes'}) do
  meta[name] = 0
end
meta.blob_bytes = nil
meta.total, meta.reopen, meta.reopen_at, meta.parked_until = nil, nil, nil, nil
meta.maybe_billed = meta.maybe_billed + calling
meta.round, meta.rev, meta.state = meta.round + 1, meta.rev + 1, 'open'
call('HDEL', META, 'identity') -- whatever strategy comes next
save_meta()
return {0, ''}
