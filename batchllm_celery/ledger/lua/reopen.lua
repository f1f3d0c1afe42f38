-- reopen.lua: some of the items that a resume or a retry runs again become ready.
--
-- ARGV     1 bytes of the bitmap to look at (8 items each)
-- returns  {1 when there is more, else 0, indexes reopened, items left as they are because their
--          payload is gone}
--#include batch.lua
if not load_meta() then return false end
local most_bytes = tonumber(ARGV[1])
if not meta.reopen or is_stopped() then
  meta.reopen, meta.reopen_at = nil, nil
  save_meta()
  return {0, {}, 0}
end
local bitmap = meta.reopen == 'stopped' and STOPPED or FAILED
local indexes, missing = {}, 0

local function reopen(index)
  local size = call('HSTRLEN', ITEM, index)
  if size == 0 then
    missing = missing + 1
    return
  end
  call('SETBIT', DONE, index, 0)
  call('SETBIT', FAILED, index, 0)
  meta.failed = meta.failed - 1
  meta.stopped = meta.stopped - call('SETBIT', STOPPED, index, 0)
  meta.kept_bytes = meta.kept_bytes - size
  meta.item_bytes = meta.item_bytes + size
  call('HSET', ATTEMPTS, index, history_text(0, meta.round, ''))
  call('HDEL', CALLS, index)
  call('ZADD', READY, NOW, index)
  indexes[#indexes + 1] = index
end

local first = call('BITPOS', bitmap, 1, meta.reopen_at)
if first < 0 then
  meta.reopen, meta.reopen_at = nil, nil
else
  local from = math.floor(first / 8)
  local bytes = call('GETRANGE', bitmap, from, from + most_bytes - 1)
  for n = 1, #bytes do
    local byte = string.byte(bytes, n)
    for bit = 7, 0, -1 do
      if byte >= 2 ^ bit then
        byte = byte - 2 ^ bit
        reopen((from + n - 1) * 8 + 7 - bit)
      end
    end
  end
  meta.reopen_at = from + #bytes
end
state_now()
save_meta()
return {meta.reopen and 1 or 0, indexes, missing}
