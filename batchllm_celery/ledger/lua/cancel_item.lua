-- cancel_item.lua: end one item that no process holds; a person's decision.
--
-- ARGV     1 index, 2 kind of the failure
-- returns  1 (it has ended now), 0 (it had its outcome, or is unknown), or -1 (a process holds it)
--#include batch.lua
if not load_meta() then return false end
local index, kind = ARGV[1], ARGV[2]
if tonumber(index) >= meta.fed or call('GETBIT', DONE, index) == 1 then return 0 end
if call('HEXISTS', HELD, index) == 1 then return -1 end
write_outcome(index, kind, false, call('HGET', ATTEMPTS, index), call('HGET', CALLS, index))
call('HDEL', ATTEMPTS, index)
call('HDEL', CALLS, index)
call('ZREM', READY, index)
state_now()
save_meta()
return 1
