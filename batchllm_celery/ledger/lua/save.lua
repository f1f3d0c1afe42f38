-- save.lua: an attempt has been answered; what the next one, here or elsewhere, must know.
--
-- ARGV     1 process, then for each item: index, token, its text, calls cut off, 1 when the call
--          that begin let in was not made
-- returns  for each item 1, or 0 when it is no longer this process's
--#include batch.lua
if not load_meta() then return false end
local process, answers, kept = ARGV[1], {}, false
for n = 2, #ARGV, 5 do
  local index, mine = ARGV[n], ARGV[n + 1] .. ' ' .. process
  local holder = call('HGET', HELD, index)
  local owned = holder and string.sub(holder, 3) == mine
  if owned then
    local losses, round = tries(call('HGET', TRY, index))
    call('HSET', TRY, index, tries_text(losses, round, ARGV[n + 2]))
    if ARGV[n + 4] == '1' and string.sub(holder, 1, 1) == CALLING then take_back(index) end
    call('HSET', HELD, index, CLAIMED .. ' ' .. mine)
    call('ZREM', READY, index)
    kept = true
    -- Repeated after a lost reply this counts twice: maybe_billed is an upper bound.
    meta.maybe_billed = meta.maybe_billed + tonumber(ARGV[n + 3])
  end
  answers[#answers + 1] = owned and 1 or 0
end
if kept then show_life(process) end
save_meta()
return answers
