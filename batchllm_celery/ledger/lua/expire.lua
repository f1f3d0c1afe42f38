-- expire.lua: a process has stalled for a lease, and its items become ready for others.
--
-- ARGV     1 process, 2 the heartbeat counter that did not change, 3 cursor ('0' at first)
-- returns  {next cursor ('0' at the end), items set free}; {'0', -1} when it has come back
--#include batch.lua
if not load_meta() then return false end
local process, stalled_at, cursor = unpack(ARGV)
local counter = call('HGET', PROCS, process)
if counter ~= stalled_at and not (counter == LOST and cursor ~= '0') then return {'0', -1} end
call('HSET', PROCS, process, LOST)
local found = call('HSCAN', HELD, cursor, 'COUNT', 1000)
local free = {}
for n = 1, #found[2], 2 do
  if string.sub(found[2][n + 1], 20) == process then
    free[#free + 1] = AT_ONCE
    free[#free + 1] = found[2][n]
  end
end
in_chunks('ZADD', READY, free)
if found[1] == '0' then call('HDEL', PROCS, process, process .. ' record') end
save_meta()
return {found[1], #free / 2}
