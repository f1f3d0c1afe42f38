-- claim.lua: take items that a message named, for one process. Repeats its reply.
--
-- ARGV     1 process, 2 token of this request, 3 revision of the spec that the process knows,
--          4 slots, 5 suspects that it holds, 6 most losses among those, 7.. indexes
-- returns  {state, revision, spec or false, now, claims, held, gone}; a claim is
--          {index, stored payload, losses, round, text of earlier attempts}
--#include batch.lua
if not load_meta() then return false end
check_keys()
local process, token = ARGV[1], ARGV[2]
local mine = token .. ' ' .. process
local slots, suspects, worst = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local state = state_now()
local open = state == 'feeding' or state == 'running'
local indexes = {unpack(ARGV, 7)}
local claims, held, gone = {}, {}, {}
local again, taken, removed = {}, {}, {}

-- A process holds few suspects: at most slots / 8^losses of the worst among them.
local function admits(losses)
  if losses == 0 then return true end
  local limit = math.max(1, math.floor(slots / 8 ^ math.max(losses, worst)))
  if suspects + 1 > limit then return false end
  suspects, worst = suspects + 1, math.max(worst, losses)
  return true
end

local holders, scores, entries, made = {}, {}, {}, {}
if #indexes > 0 then -- none: the process holds all that the message names, and asks for the spec
  holders = call('HMGET', HELD, unpack(indexes))
  scores = call('ZMSCORE', READY, unpack(indexes))
  entries = call('HMGET', TRY, unpack(indexes))
  made = call('HMGET', CALLS, unpack(indexes))
end
for n, index in ipairs(indexes) do
  local holder, entry = holders[n], entries[n]
  local losses, round, rest = tries(entry)
  if holder and string.sub(holder, 3) == mine then
    claims[#claims + 1] = {index, call('HGET', ITEM, index), losses, round, rest}
    if scores[n] then removed[#removed + 1] = index end
  elseif not scores[n] then
    local to = holder and held or gone
    to[#to + 1] = tonumber(index)
  elseif not open then
    held[#held + 1] = tonumber(index)
    again[#again + 1] = NOW
    again[#again + 1] = index
  else
    if holder and string.sub(holder, 1, 1) == CALLING then
      losses = losses + 1 -- its process went silent in mid-call
      meta.maybe_billed = meta.maybe_billed + 1
      call('HSET', TRY, index, tries_text(losses, round, rest))
      call('HSET', HELD, index, CLAIMED .. string.sub(holder, 2)) -- counted once
    end
    local _, cut = calls_of(made[n])
    if losses + cut >= meta.max_deliveries then
      local kind = cut > 0 and 'cut_off' or 'worker_lost'
      give_outcome(index, kind, false, tries_text(losses, round, rest), made[n])
      call('HDEL', HELD, index)
      call('HDEL', TRY, index)
      call('HDEL', CALLS, index)
      call('ZREM', READY, index)
      gone[#gone + 1] = tonumber(index)
    elseif not admits(losses) then
      held[#held + 1] = tonumber(index)
      again[#again + 1] = NOW + 1000
      again[#again + 1] = index
    else
      claims[#claims + 1] = {index, call('HGET', ITEM, index), losses, round, rest}
      removed[#removed + 1] = index
      taken[#taken + 1] = index
      taken[#taken + 1] = CLAIMED .. ' ' .. mine
    end
  end
end
in_chunks('ZADD', READY, again)
in_chunks('ZREM', READY, removed)
in_chunks('HSET', HELD, taken)
if #taken + #removed > 0 then show_life(process) end
state = state_now()
save_meta()
local spec = tonumber(ARGV[3]) ~= meta.rev and call('HGET', META, 'spec')
return {state, meta.rev, spec, NOW, claims, held, gone}
