-- release.lua: items go back at once; their process lives, so it is no loss.
--
-- ARGV     1 process, 2 milliseconds until they may be offered (0: at once, before all else),
--          then for each item: index, token, 1 when its call was cut off, else 0
-- returns  {state, items given back}
if not load_meta() then return false end
local process, count = ARGV[1], 0
local score = ARGV[2] == '0' and AT_ONCE or NOW + tonumber(ARGV[2])
for n = 3, #ARGV, 3 do
  local index, mine = ARGV[n], ARGV[n + 1] .. ' ' .. process
  local holder = call('HGET', HELD, index)
  if holder and string.sub(holder, 3) == mine then
    call('HDEL', HELD, index)
    call('ZADD', READY, score, index)
    meta.maybe_billed = meta.maybe_billed + tonumber(ARGV[n + 2])
    count = count + 1
  end
end
local state = state_now()
save_meta()
return {state, count}
