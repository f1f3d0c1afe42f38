-- beat.lua: the heartbeat of a process, which renews everything that it holds in this batch.
--
-- ARGV     1 process
-- returns  {state, 1 when it had been given up (or is new) and should reclaim its items, else 0}
--#include batch.lua
if not load_meta() then return false end
local process = ARGV[1]
local counter = call('HGET', PROCS, process)
local lost = not counter or string.sub(counter, 1, 1) == LOST
call('HSET', PROCS, process, text(NOW))
local state = state_now()
save_meta()
return {state, lost and 1 or 0}
