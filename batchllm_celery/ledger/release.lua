-- release.lua: items go back at once; their process lives, so it is no loss.
--
-- ARGV     1 process, then for each item: index, token, 1 when its call was cut off, else 0
-- returns  {state, items given back}
if not load_meta() then return false end
local process, count = ARGV[1], 0
for n = 2, #ARGV, 3 do
  local index, mine = ARGV[n], ARGV[n + 1] .. ' ' .. process
  local holder = call('HGET', HELD, index)
  if holder and string.sub(holder, 3) == mine then
    call('HDEL', HELD, index)
    call('ZADD', READY, AT_ONCE, index)
    meta.maybe_billed = meta.maybe_billed + tonumber(ARGV[n + 2])
    count = count + 1
  end
end
local state = state_now()
save_meta()
return {state, count}
