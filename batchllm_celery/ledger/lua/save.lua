-- save.lua: a call has ended without an outcome; keeps what the next attempt must know.
--
-- ARGV     1 process, then for each item: index, token, what `codec.Attempts` wrote, calls cut off,
--          1 when the call that `begin` admitted was not made
-- returns  for each item 1, or 0 when it is no longer this process's
--#include batch.lua
if not load_meta() then return false end
local process, answers, saved = ARGV[1], {}, false
for at = 2, #ARGV, 5 do
  local index, token, attempts, cut_off, unused = unpack(ARGV, at, at + 4)
  local mine = token .. ' ' .. process
  local holder = call('HGET', HELD, index)
  local owned = holder and string.sub(holder, 3) == mine
  if owned then
    local losses, round = history(call('HGET', ATTEMPTS, index))
    call('HSET', ATTEMPTS, index, history_text(losses, round, attempts))
    if unused == '1' and string.sub(holder, 1, 1) == CALLING then uncount_call(index) end
    call('HSET', HELD, index, CLAIMED .. ' ' .. mine)
    call('ZREM', READY, index)
    saved = true
    -- Repeated after a lost reply this counts twice: maybe_billed is an upper bound.
    meta.maybe_billed = meta.maybe_billed + tonumber(cut_off)
  end
  answers[#answers + 1] = owned and 1 or 0
end
if saved then note_alive(process) end
save_meta()
return answers
