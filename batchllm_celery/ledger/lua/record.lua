-- record.lua: write the outcomes of items; the first one wins. A repeated call gets the same reply.
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
-- An item of a standing batch ends by itself (it has expired), not with its batch.
if meta.standing then CONTROL = {} end
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
local entries = call('HMGET', ATTEMPTS, unpack(indexes))
local answers, finished, back = {}, {}, {}

for n, index in ipairs(indexes) do
  local at = 3 + (n - 1) * FIELDS
  local token, its_round, print, kind, line = unpack(ARGV, at + 1, at + 5)
  local input, output, cached, spent, cost, cut_off = unpack(ARGV, at + 6, at + 11)
  local owned = holders[n] and string.sub(holders[n], 3) == token .. ' ' .. process
  local accepted = false
  if tonumber(index) < meta.fed and call('GETBIT', DONE, index) == 0 then
    if kind ~= '' then
      accepted = owned
    else
      local _, round = history(entries[n])
      accepted = round == tonumber(its_round)
        and call('GETRANGE', FP, index * 8, index * 8 + 7) == print
    end
  end
  if owned and accepted and CONTROL[kind] and not is_stopped() then
    accepted = false -- resumed in the meantime: it runs again
    back[#back + 1] = AT_ONCE
    back[#back + 1] = index
    call('HDEL', HELD, index)
  end
  if accepted then
    append({'i', index, 'r', line})
    mark(index, kind == '', CONTROL[kind])
    drop_payload(index, call('HSTRLEN', ITEM, index), kind ~= '')
    finished[#finished + 1] = index
    meta.input = meta.input + tonumber(input)
    meta.output = meta.output + tonumber(output)
    meta.cached = meta.cached + tonumber(cached)
    meta.spent = meta.spent + tonumber(spent)
    if cost ~= '' then
      meta.cost = meta.cost + tonumber(cost)
      meta.priced = 1
    end
    if kind ~= '' and string.find(meta.fail_fast, kind .. ',', 1, true)
      and (meta.state == 'open' or meta.state == 'paused') then
      meta.state = 'aborted'
    end
  end
  cut_off = tonumber(cut_off)
  if owned and CONTROL[kind] and string.sub(holders[n], 1, 1) == CALLING then
    cut_off = math.max(1, cut_off) -- stopped in mid-call
  end
  meta.maybe_billed = meta.maybe_billed + cut_off
  answers[n] = accepted and 1 or 0
end
in_chunks('HDEL', HELD, finished)
in_chunks('HDEL', ATTEMPTS, finished)
in_chunks('HDEL', CALLS, finished)
in_chunks('ZREM', READY, finished)
in_chunks('ZADD', READY, back)
call('HSET', PROCS, memory, request .. table.concat(answers))
local state = state_now()
save_meta()
return {state, answers}
