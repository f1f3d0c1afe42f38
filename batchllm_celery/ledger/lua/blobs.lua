-- blobs.lua: store large values of payloads that `feed` has found missing. Idempotent.
--
-- ARGV     for each blob: SHA-256 (32 bytes), bytes
-- returns  1
--#include batch.lua
if not load_meta() then return false end
for n = 1, #ARGV, 2 do
  local sha, data = ARGV[n], ARGV[n + 1]
  if call('HSETNX', BLOB, sha, data) == 1 then
    call('HSETNX', REFS, sha, 0)
    meta.blob_bytes = (meta.blob_bytes or 0) + #data
  end
end
save_meta()
return 1
