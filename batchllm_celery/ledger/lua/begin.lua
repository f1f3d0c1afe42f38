-- begin.lua: may these calls start now? Decides pause, cancel, deadline and budget, and counts.
--
-- Here alone the calls of an item are bounded, whatever goes wrong elsewhere: `max_calls` of them
-- in a round, and one more for each day on which a day's quota may have refused one.
--
-- ARGV     1 process, then for each item: index, token
-- returns  {state, for each item 1 (go), 0 (no longer this process's), or the number of its calls
--          as a negative number: there are to be no more}
--#include batch.lua
if not load_meta() then return false end
check_keys()
local process, state = ARGV[1], state_now()
local open = state == 'feeding' or state == 'running'
local indexes, tokens, answers, starting, counted = {}, {}, {}, {}, {}
local days = 1 + math.floor((NOW - meta.submitted_at) / 86400000)
local most = (meta.max_calls or math.huge) + days
for n = 2, #ARGV, 2 do
  indexes[#indexes + 1] = ARGV[n]
  tokens[#tokens + 1] = ARGV[n + 1]
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
    -- Begun already: its call has not been made yet, or the reply that let it in was lost.
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
in_chunks('ZREM', READY, kept) -- the lease had ended, but nobody took it
if #kept > 0 then show_life(process) end
save_meta()
return {state, answers}
