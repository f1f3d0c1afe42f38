-- release.lua: items become ready again. Their process lives, so this counts as no loss.
--
-- ARGV     1 process, 2 milliseconds until they may be requeued (0: at once, before all others),
--          then for each item: index, token, calls that may be billed although nobody has their
--          answer, and what cut its call off ('' for no call, 'back' for one that `begin` admitted
--          and that was never made)
-- returns  {state, items released}
--#include batch.lua
if not load_meta() then return false end
local process, delay, count = ARGV[1], tonumber(ARGV[2]), 0
local score = delay == 0 and AT_ONCE or NOW + delay
for at = 3, #ARGV, 4 do
  local index, token, unanswered, why = unpack(ARGV, at, at + 3)
  local holder = call('HGET', HELD, index)
  if holder and string.sub(holder, 3) == token .. ' ' .. process then
    call('HDEL', HELD, index)
    call('ZADD', READY, score, index)
    meta.maybe_billed = meta.maybe_billed + tonumber(unanswered)
    if why == 'back' then
      if string.sub(holder, 1, 1) == CALLING then uncount_call(index) end
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
