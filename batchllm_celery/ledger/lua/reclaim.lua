-- adopt.lua: a process that was given up takes back those of its items that nobody took.
--
-- ARGV     1 process, then for each item: index, token, round, fingerprint, phase
-- returns  items that are this process's now
--#include batch.lua
if not load_meta() then return false end
local process, count = ARGV[1], 0
for n = 2, #ARGV, 5 do
  local index, mine = ARGV[n], ARGV[n + 1] .. ' ' .. process
  local holder = call('HGET', HELD, index)
  if call('ZSCORE', READY, index) then
    local _, round = tries(call('HGET', TRY, index))
    local same = round == tonumber(ARGV[n + 2])
      and call('GETRANGE', FP, index * 8, index * 8 + 7) == ARGV[n + 3]
    -- Without a holder Redis has lost the claim itself: it came back from an older state.
    if same and (not holder or string.sub(holder, 3) == mine) then
      call('HSET', HELD, index, (holder and string.sub(holder, 1, 1) or ARGV[n + 4]) .. ' ' .. mine)
      call('ZREM', READY, index)
      count = count + 1
    end
  elseif holder and string.sub(holder, 3) == mine then
    count = count + 1
  end
end
if count > 0 then show_life(process) end
save_meta()
return count
