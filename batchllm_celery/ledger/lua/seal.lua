-- seal.lua: the producer has fed everything.
--
-- ARGV     1 rows in all
-- returns  {state, total}; fewer rows than were fed once stay as many as were fed
--#include batch.lua
if not load_meta() then return false end
local total = tonumber(ARGV[1])
meta.total = math.max(total, meta.fed)
local state = state_now()
save_meta()
return {state, meta.total}
