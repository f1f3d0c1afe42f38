-- reclaim.lua: a process that was given up holds again those of its items that nobody has claimed.
--
-- ARGV     1 process, then for each item: index, token, round, fingerprint, phase
-- returns  items of these that the process holds now
--#include batch.lua
if not load_meta() then return false end
local process, count = ARGV[1], 0
for at = 2, #ARGV, 5 do
  local index, token, its_round, print, phase = unpack(ARGV, at, at + 4)
  local mine = token .. ' ' .. process
  local holder = call('HGET', HELD, index)
  if call('ZSCORE', READY, index) then
    local _, round = history(call('HGET', ATTEMPTS, index))
    local same = round == tonumber(its_round)
      and call('GETRANGE', FP, index * 8, index * 8 + 7) == print
    -- Without a holder Redis has lost the claim itself: it came back from an older state.
    if same and (not holder or string.sub(holder, 3) == mine) then
      call('HSET', HELD, index, (holder and string.sub(holder, 1, 1) or phase) .. ' ' .. mine)
      call('ZREM', READY, index)
      count = count + 1
    end
  elseif holder and string.sub(holder, 3) == mine then
    count = count + 1
  end
end
if count > 0 then note_alive(process) end
save_meta()
return count
