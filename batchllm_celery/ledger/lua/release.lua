-- release.lua: items go back at once; their process lives, so it is no loss.
--
-- ARGV     1 process, 2 milliseconds until they may be offered (0: at once, before all else),
--          then for each item: index, token, calls that may be billed although nobody has their
--          answer, what cut its call off ('' for none was, 'back' for one that begin let in and
--          that was never made)
-- returns  {state, items given back}
--#include batch.lua
if not load_meta() then return false end
local process, count = ARGV[1], 0
local score = ARGV[2] == '0' and AT_ONCE or NOW + tonumber(ARGV[2])
for n = 3, #ARGV, 4 do
  local index, mine = ARGV[n], ARGV[n + 1] .. ' ' .. process
  local holder = call('HGET', HELD, index)
  if holder and string.sub(holder, 3) == mine then
    call('HDEL', HELD, index)
    call('ZADD', READY, score, index)
    meta.maybe_billed = meta.maybe_billed + tonumber(ARGV[n + 2])
    local why = ARGV[n + 3]
    if why == 'back' then
      if string.sub(holder, 1, 1) == CALLING then take_back(index) end
    elseif why ~= '' then
      local begun, cut = calls_of(call('HGET', CALLS, index))
      call('HSET', CALLS, index, calls_text(begun, cut + 1, why))
    end
    count = count + 1
  end
end
local state = state_now()
save_meta()
return {state, count}
