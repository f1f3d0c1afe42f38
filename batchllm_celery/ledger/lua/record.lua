-- record.lua: the outcomes of items; first write wins. Repeats its reply.
--
-- ARGV     1 process, 2 request, then for each item: index, token, round, fingerprint,
--          kind ('' for a success), result line, input, output and cached tokens,
--          tokens to count against the budget, cost ('' where unknown), calls cut off
-- returns  {state, for each item 1 (recorded) or 0 (refused)}
--
-- A failure needs the claim. A success needs only the item as it is now, without an outcome:
-- a worker that was given up comes back with an answer that is paid for.
--#include batch.lua
local FIELDS = 12
local CONTROL = {cancelled = true, deadline = true, budget = true, aborted = true}
if not load_meta() then return false end
local process, request = ARGV[1], ARGV[2]
local memory = process .. ' record'
local last = call('HGET', PROCS, memory)
if last and string.sub(last, 1, #request) == request then
  local answers = {}
  for n = #request + 1, #last do answers[#answers + 1] = tonumber(string.sub(last, n, n)) end
  return {state_now(), answers}
end

local indexes = {}
for n = 3, #ARGV, FIELDS do indexes[#indexes + 1] = ARGV[n] end
local holders = call('HMGET', HELD, unpack(indexes))
local entries = call('HMGET', TRY, unpack(indexes))
local answers, finished, succeeded, back = {}, {}, {}, {}

local function acceptable(n, at, owned)
  local index = ARGV[at]
  if tonumber(index) >= meta.fed or call('GETBIT', DONE, index) == 1 then return false end
  if ARGV[at + 4] ~= '' then return owned end
  local _, round = tries(entries[n])
  return round == tonumber(ARGV[at + 2])
    and call('GETRANGE', FP, index * 8, index * 8 + 7) == ARGV[at + 3]
end

for n, index in ipairs(indexes) do
  local at = 3 + (n - 1) * FIELDS
  local kind = ARGV[at + 4]
  local owned = holders[n] and string.sub(holders[n], 3) == ARGV[at + 1] .. ' ' .. process
  local accepted = acceptable(n, at, owned)
  if owned and accepted and CONTROL[kind] and not is_stopped() then
    accepted = false -- resumed in the meantime: it runs again
    back[#back + 1] = AT_ONCE
    back[#back + 1] = index
    call('HDEL', HELD, index)
  end
  if accepted then
    append({'i', index, 'r', ARGV[at + 5]})
    mark(index, kind == '', CONTROL[kind])
    drop_payload(index, call('HSTRLEN', ITEM, index), kind ~= '')
    finished[#finished + 1] = index
    meta.input = meta.input + tonumber(ARGV[at + 6])
    meta.output = meta.output + tonumber(ARGV[at + 7])
    meta.cached = meta.cached + tonumber(ARGV[at + 8])
    meta.spent = meta.spent + tonumber(ARGV[at + 9])
    if ARGV[at + 10] ~= '' then
      meta.cost = meta.cost + tonumber(ARGV[at + 10])
      meta.priced = 1
    end
    if kind ~= '' and string.find(meta.fail_fast, kind .. ',', 1, true)
      and (meta.state == 'open' or meta.state == 'paused') then
      meta.state = 'aborted'
    end
  end
  local cut_off = tonumber(ARGV[at + 11])
  if owned and CONTROL[kind] and string.sub(holders[n], 1, 1) == CALLING then
    cut_off = math.max(1, cut_off) -- stopped in mid-call
  end
  meta.maybe_billed = meta.maybe_billed + cut_off
  answers[n] = accepted and 1 or 0
end
in_chunks('HDEL', HELD, finished)
in_chunks('HDEL', TRY, finished)
in_chunks('HDEL', CALLS, finished)
in_chunks('ZREM', READY, finished)
in_chunks('ZADD', READY, back)
call('HSET', PROCS, memory, request .. table.concat(answers))
local state = state_now()
save_meta()
return {state, answers}
