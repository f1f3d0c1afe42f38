-- begin.lua: may these calls start now? Decides pause, cancel, deadline and budget, and counts calls.
--
-- This is the one place that bounds the calls of an item, whatever goes wrong elsewhere: `max_calls`
-- in a round, and one more for each day on which a day's quota may have refused one.
--
-- ARGV     1 process, 2 1: check the types of all keys, then for each item: index, token
-- returns  {state, for each item 1 (the call may start), 0 (no longer this process's), or the
--          number of its calls as a negative number (it has used them up)}
--#include batch.lua
if not load_meta() then return false end
if ARGV[2] == '1' then check_keys() end
local process, state = ARGV[1], state_now()
local open = state == 'feeding' or state == 'running'
local indexes, tokens, answers, starting, counted = {}, {}, {}, {}, {}
local days = 1 + math.floor((NOW - meta.submitted_at) / 86400000)
local most = (meta.max_calls or math.huge) + days
for at = 3, #ARGV, 2 do
  indexes[#indexes + 1] = ARGV[at]
  tokens[#tokens + 1] = ARGV[at + 1]
end
local holders = call('HMGET', HELD, unpack(indexes))
local made = call('HMGET', CALLS, unpack(indexes))
local kept = {}
for n, index in ipairs(indexes) do
  local mine = tokens[n] .. ' ' .. process
  local owned = holders[n] and string.sub(holders[n], 3) == mine
  answers[n] = owned and 1 or 0
  if owned and open then
    local begun, cut, why = calls_of(made[n])
    -- Begun already: its call has not been made yet, or the reply that admitted it was lost.
    local again = string.sub(holders[n], 1, 1) == CALLING
    if again or begun < most then
      kept[#kept + 1] = index
      starting[#starting + 1] = index
      starting[#starting + 1] = CALLING .. ' ' .. mine
    else
      answers[n] = -begun
    end
    if not again and begun < most then
      counted[#counted + 1] = index
      counted[#counted + 1] = calls_text(begun + 1, cut, why)
    end
  end
end
in_chunks('HSET', HELD, starting)
in_chunks('HSET', CALLS, counted)
in_chunks('ZREM', READY, kept) -- the lease had ended, but nobody has claimed it
if #kept > 0 then note_alive(process) end
save_meta()
return {state, answers}
