-- progress.lua: the counters of a batch.
--
-- returns  a list of names and values
--#include batch.lua
if not load_meta() then return false end
check_keys()
local state = state_now()
save_meta()
local answer = {'state', state, 'held', call('HLEN', HELD), 'ready', call('ZCARD', READY)}
for _, name in ipairs(NUMBERS) do
  if meta[name] then
    answer[#answer + 1] = name
    answer[#answer + 1] = text(meta[name])
  end
end
return answer
