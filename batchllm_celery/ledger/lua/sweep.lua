-- sweep.lua: write the outcomes of items of a stopped batch that nobody holds.
--
-- ARGV     1 most items, 2 most payload bytes to read
-- returns  {state, items still ready}
--#include batch.lua
if not load_meta() then return false end
local most_items, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local state = state_now()
if is_stopped() then
  local indexes, bytes, ended = call('ZRANGE', READY, 0, most_items - 1), 0, {}
  local holders, entries = {}, {}
  if #indexes > 0 then
    holders = call('HMGET', HELD, unpack(indexes))
    entries = call('HMGET', ATTEMPTS, unpack(indexes))
  end
  for n, index in ipairs(indexes) do
    if holders[n] and string.sub(holders[n], 1, 1) == CALLING then
      meta.maybe_billed = meta.maybe_billed + 1 -- its process stalled in mid-call
    end
    bytes = bytes + write_outcome(index, meta.state, true, entries[n])
    ended[n] = index
    if bytes > most_bytes then break end
  end
  in_chunks('ZREM', READY, ended)
  in_chunks('HDEL', HELD, ended)
  in_chunks('HDEL', ATTEMPTS, ended)
  in_chunks('HDEL', CALLS, ended)
end
save_meta()
return {state, is_stopped() and call('ZCARD', READY) or 0}
