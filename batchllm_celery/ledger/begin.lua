-- begin.lua: may these calls start now? Decides pause, cancel, deadline and budget.
--
-- ARGV     1 process, then for each item: index, token
-- returns  {state, for each item 1 (go) or 0 (not, or no longer this process's)}
if not load_meta() then return false end
check_keys()
local process, state = ARGV[1], state_now()
local open = state == 'feeding' or state == 'running'
local indexes, tokens, answers, starting = {}, {}, {}, {}
for n = 2, #ARGV, 2 do
  indexes[#indexes + 1] = ARGV[n]
  tokens[#tokens + 1] = ARGV[n + 1]
end
local holders = call('HMGET', HELD, unpack(indexes))
local kept = {}
for n, index in ipairs(indexes) do
  local mine = tokens[n] .. ' ' .. process
  local owned = holders[n] and string.sub(holders[n], 3) == mine
  answers[n] = owned and 1 or 0
  if owned and open then
    kept[#kept + 1] = index
    starting[#starting + 1] = index
    starting[#starting + 1] = CALLING .. ' ' .. mine
  end
end
in_chunks('HSET', HELD, starting)
in_chunks('ZREM', READY, kept) -- the lease had ended, but nobody took it
if #kept > 0 then show_life(process) end
save_meta()
return {state, answers}
