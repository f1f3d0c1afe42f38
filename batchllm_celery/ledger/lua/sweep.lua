-- sweep.lua: give items of a stopped batch, that nobody holds, their outcome.
--
-- ARGV     1 items at most, 2 payload bytes to read at most
-- returns  {state, items still ready}
--#include batch.lua
if not load_meta() then return false end
local state = state_now()
if is_stopped() then
  local indexes, bytes, ended = call('ZRANGE', READY, 0, tonumber(ARGV[1]) - 1), 0, {}
  local holders, entries = {}, {}
  if #indexes > 0 then
    holders = call('HMGET', HELD, unpack(indexes))
    entries = call('HMGET', TRY, unpack(indexes))
  end
  for n, index in ipairs(indexes) do
    if holders[n] and string.sub(holders[n], 1, 1) == CALLING then
      meta.maybe_billed = meta.maybe_billed + 1 -- its process went silent in mid-call
    end
    bytes = bytes + give_outcome(index, meta.state, true, entries[n])
    ended[n] = index
    if bytes > tonumber(ARGV[2]) then break end
  end
  in_chunks('ZREM', READY, ended)
  in_chunks('HDEL', HELD, ended)
  in_chunks('HDEL', TRY, ended)
  in_chunks('HDEL', CALLS, ended)
end
save_meta()
return {state, is_stopped() and call('ZCARD', READY) or 0}
