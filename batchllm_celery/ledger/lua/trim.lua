-- trim.lua: the consumer has everything up to an entry.
--
-- ARGV     1 holder of the consumer lock, 2 entry id, 3 the id after it
-- returns  1, or 0 when somebody else holds the lock
--#include batch.lua
if not load_meta() then return false end
local process, upto, following = unpack(ARGV)
local lock = call('HGET', META, 'lock:consumer')
if not lock or string.sub(lock, string.find(lock, ' ', 1, true) + 1) ~= process then return 0 end
local entry = call('XREVRANGE', OUT, upto, '-', 'COUNT', 1)[1]
if entry then
  local count, bytes = string.match(entry[2][2], '^(%d+):(%d+)$')
  meta.read_count = math.max(meta.read_count, tonumber(count))
  meta.read_bytes = math.max(meta.read_bytes, tonumber(bytes))
  if meta.keep ~= 1 then call('XTRIM', OUT, 'MINID', following) end
end
save_meta()
return 1
