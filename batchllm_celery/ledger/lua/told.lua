-- told.lua: whoever was to be told that the batch is over has been told.
--
-- ARGV     1 the round that had ended
-- returns  1
--#include batch.lua
if not load_meta() then return false end
meta.hook_round = math.max(meta.hook_round or -1, tonumber(ARGV[1]))
meta.hook_at = nil
save_meta()
return 1
