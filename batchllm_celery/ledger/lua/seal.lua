-- seal.lua: the producer has fed everything.
--
-- ARGV     1 rows in all
-- returns  {state, total}; fewer rows than were fed once stay as many as were fed
--#include batch.lua
if not load_meta() then return false end
local total = tonumber(ARGV[1])
meta.total = math.max(total, meta.fed)
local superseded = call('HGET', META, 'superseded')
if superseded then -- results of the generation before: those that stay were delivered again
  local milliseconds, sequence = string.match(superseded, '^(%d+)-(%d+)$')
  call('XTRIM', OUT, 'MINID', milliseconds .. '-' .. text(tonumber(sequence) + 1))
  call('HDEL', META, 'superseded')
end
-- Blobs that were stored for rows which never came: the producer died between the two.
if meta.blob_bytes and meta.blob_bytes > 0 then
  local refs = call('HGETALL', REFS)
  for n = 1, #refs, 2 do
    if tonumber(refs[n + 1]) <= 0 then remove_blob(refs[n]) end
  end
end
local state = state_now()
save_meta()
return {state, meta.total}
