-- append.lua: items for a standing batch, which is never fed to an end. A repeated call adds nothing.
--
-- ARGV     1 ms until a worker may look for an item that no message brought, 2 most bytes of payloads,
--          then for each item: id, Celery task that awaits it ('' for none), ms before which it may
--          not run, fingerprint (8 bytes), payload, SHAs of its blobs (32 bytes each)
-- returns  {state, 1 where the batch was over before, the items' indexes}; {'full'} without room;
--          {'blobs', SHAs} when these are missing: store them (`blobs.lua`) and repeat the call
--#include batch.lua
if not load_meta() then return false end
local grace, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
if meta.item_bytes + (meta.blob_bytes or 0) >= most_bytes then return {'full'} end
local was_over = meta.ok + meta.failed >= meta.fed
local state = state_now()
if is_stopped() then return {state, 0, {}} end
local missing = {}
for at = 3, #ARGV, 6 do
  if call('HEXISTS', IDS, ARGV[at]) == 0 then missing_blobs(ARGV[at + 5], missing) end
end
if #missing > 0 then return {'blobs', missing} end
local indexes, items, ready, ids, tasks = {}, {}, {}, {}, {}
local stamp = string.format('%013.0f', NOW)
for at = 3, #ARGV, 6 do
  local id, task, delay, print, payload, uses = unpack(ARGV, at, at + 5)
  local known = call('HGET', IDS, id)
  local index = known and tonumber(known) or meta.fed
  indexes[#indexes + 1] = index
  if not known then
    meta.fed = index + 1
    meta.item_bytes = meta.item_bytes + #payload + STAMP
    call('HSET', IDS, id, index)
    call('SETRANGE', FP, index * 8, print)
    set_uses(index, uses)
    items[#items + 1] = index
    items[#items + 1] = stamp .. print .. payload
    ready[#ready + 1] = NOW + grace + tonumber(delay)
    ready[#ready + 1] = index
    if task ~= '' then
      tasks[#tasks + 1] = index
      tasks[#tasks + 1] = task
    end
  end
end
in_chunks('HSET', ITEM, items)
in_chunks('ZADD', READY, ready)
in_chunks('HSET', TASKS, tasks)
meta.total = meta.fed
if meta.state == 'finished' then meta.state = 'open' end
state = state_now()
save_meta()
return {state, was_over and 1 or 0, indexes}
