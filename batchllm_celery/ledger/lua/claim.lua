-- claim.lua: hold the items that a message named, for one process. A repeated call gets the same reply.
--
-- An item in whose calls processes have died (losses) may be what killed them: a poison candidate. A
-- process holds few of those, so that the next death tells which one it was. At `max_deliveries`
-- losses and cut-off calls an item is quarantined: it fails.
--
-- ARGV     1 process, 2 token of this request, 3 revision of the spec that the process knows,
--          4 1: check the types of all keys, 5 slots, 6 poison candidates that the process holds,
--          7 most losses among those, 8.. indexes
-- returns  {state, revision, spec or false, now, claims, held, gone}; a claim is
--          {index, stored payload, losses, round, text of earlier attempts}
--#include batch.lua
if not load_meta() then return false end
local process, token, revision, check = unpack(ARGV, 1, 4)
local slots, candidates, worst = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
if check == '1' then check_keys() end
local mine = token .. ' ' .. process
local state = state_now()
local open = state == 'feeding' or state == 'running'
local indexes = {unpack(ARGV, 8)}
local claims, held, gone = {}, {}, {}
local again, taken, removed = {}, {}, {}

-- At most slots / 8^losses poison candidates, by the losses of the worst among them.
local function admits(losses)
  if losses == 0 then return true end
  local limit = math.max(1, math.floor(slots / 8 ^ math.max(losses, worst)))
  if candidates + 1 > limit then return false end
  candidates, worst = candidates + 1, math.max(worst, losses)
  return true
end

local holders, scores, entries, made = {}, {}, {}, {}
if #indexes > 0 then -- without any the process only asks for the spec
  holders = call('HMGET', HELD, unpack(indexes))
  scores = call('ZMSCORE', READY, unpack(indexes))
  entries = call('HMGET', ATTEMPTS, unpack(indexes))
  made = call('HMGET', CALLS, unpack(indexes))
end
for n, index in ipairs(indexes) do
  local holder, entry = holders[n], entries[n]
  local losses, round, rest = history(entry)
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
      losses = losses + 1 -- its process stalled in mid-call
      meta.maybe_billed = meta.maybe_billed + 1
      call('HSET', ATTEMPTS, index, history_text(losses, round, rest))
      call('HSET', HELD, index, CLAIMED .. string.sub(holder, 2)) -- counted once
    end
    local _, cut = calls_of(made[n])
    if losses + cut >= meta.max_deliveries then
      local kind = cut > 0 and 'cut_off' or 'worker_lost'
      write_outcome(index, kind, false, history_text(losses, round, rest), made[n])
      call('HDEL', HELD, index)
      call('HDEL', ATTEMPTS, index)
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
if #taken + #removed > 0 then note_alive(process) end
state = state_now()
save_meta()
local spec = tonumber(revision) ~= meta.rev and call('HGET', META, 'spec')
return {state, meta.rev, spec, NOW, claims, held, gone}
