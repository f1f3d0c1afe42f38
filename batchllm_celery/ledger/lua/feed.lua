-- feed.lua: a chunk of rows, in input order. Idempotent by index and fingerprint.
--
-- ARGV     1 first index, 2 most items outstanding, 3 most bytes, 4 milliseconds before an item that
--          no message brought is requeued, then for each row: fingerprint (8 bytes),
--          payload, '' or the result line of a row that can't be run (or for a row whose outcome is
--          known already '+' for a success or '-', and the line to deliver, '' for none), and the
--          SHAs of the payload's blobs (32 bytes each)
-- returns  {fed, state, indexes that need a message}; {fed, 'full'} when there is no room;
--          {fed, 'gap'} when rows before the first index are missing; {fed, 'blobs', SHAs} when
--          these are missing: store them (`blobs.lua`) and repeat the call
--#include batch.lua
if not load_meta() then return false end
local first, most_items, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local grace, count = tonumber(ARGV[4]), (#ARGV - 4) / 4
if first > meta.fed then return {meta.fed, 'gap'} end

local unread = meta.keep == 1 and 0 or meta.out_count - meta.read_count
local unfinished = meta.fed - meta.ok - meta.failed
local bytes = meta.item_bytes + (meta.blob_bytes or 0) + meta.out_bytes - meta.read_bytes
local fresh = math.max(0, first + count - meta.fed)
if fresh > 0 and unfinished + unread > 0
  and (unfinished + unread + fresh > most_items or bytes >= most_bytes) then
  state_now()
  save_meta()
  return {meta.fed, 'full'}
end

-- A row whose content has changed begins again: what is known of the old one is removed.
local function forget(index)
  local held = call('HGET', HELD, index)
  if held and string.sub(held, 1, 1) == CALLING then meta.maybe_billed = meta.maybe_billed + 1 end
  call('HDEL', HELD, index)
  call('HDEL', ATTEMPTS, index)
  call('HDEL', CALLS, index)
  local size = call('HSTRLEN', ITEM, index)
  local done = call('SETBIT', DONE, index, 0) == 1
  if not done then
    meta.item_bytes = meta.item_bytes - size
  elseif call('SETBIT', FAILED, index, 0) == 1 then
    meta.failed = meta.failed - 1
    meta.stopped = meta.stopped - call('SETBIT', STOPPED, index, 0)
    meta.kept_bytes = meta.kept_bytes - size
  else
    meta.ok = meta.ok - 1
  end
end

local known = call('GETRANGE', FP, first * 8, (first + count) * 8 - 1)

-- A row that was fed before, of the same content.
local function is_known(n, print)
  return first + n < meta.fed and string.sub(known, n * 8 + 1, n * 8 + 8) == print
end

-- A failure whose payload had to go: a retry needs it.
local function lost_payload(index, payload, line)
  return line == '' and call('GETBIT', FAILED, index) == 1 and call('HEXISTS', ITEM, index) == 0
    and may_keep(#payload)
end

local missing = {}
for n = 0, count - 1 do
  local print, payload, line, uses = unpack(ARGV, 5 + n * 4, 8 + n * 4)
  if uses ~= '' and (not is_known(n, print) or lost_payload(first + n, payload, line)) then
    missing_blobs(uses, missing)
  end
end
if #missing > 0 then
  save_meta()
  return {meta.fed, 'blobs', missing}
end

local prints, items, ready, wake, lines = {}, {}, {}, {}, {}
local stamp = string.format('%013.0f', NOW)
local due = NOW + grace
for n = 0, count - 1 do
  local index, at = first + n, 5 + n * 4
  local print, payload, line, uses = unpack(ARGV, at, at + 3)
  local old = index < meta.fed
  local sign = string.sub(line, 1, 1)
  local answered = sign == '+' or sign == '-' -- a failure that somebody has reopened runs
  prints[n + 1] = print
  if is_known(n, print) and not (sign == '+' and call('GETBIT', DONE, index) == 0) then
    if call('ZSCORE', READY, index) then
      wake[#wake + 1] = index
    elseif lost_payload(index, payload, line) then
      set_uses(index, uses)
      items[#items + 1] = index
      items[#items + 1] = stamp .. print .. payload
      meta.kept_bytes = meta.kept_bytes + #payload + STAMP
    end
  else
    if old then forget(index) end
    set_uses(index, uses)
    if line ~= '' then
      lines[#lines + 1] = {index, answered and string.sub(line, 2) or line, sign == '+'}
      call('ZREM', READY, index)
      call('HDEL', ITEM, index)
    else
      items[#items + 1] = index
      items[#items + 1] = stamp .. print .. payload
      meta.item_bytes = meta.item_bytes + #payload + STAMP
      ready[#ready + 1] = due
      ready[#ready + 1] = index
      wake[#wake + 1] = index
    end
  end
end
call('SETRANGE', FP, first * 8, table.concat(prints))
in_chunks('HSET', ITEM, items)
in_chunks('ZADD', READY, ready)
if first + count > meta.fed then
  meta.fed = first + count
  meta.total = nil -- the input has grown: until the producer has fed it to its end
end
for _, row in ipairs(lines) do
  if row[2] ~= '' then append({'i', text(row[1]), 'r', row[2]}) end
  mark(row[1], row[3], false)
end
if meta.state == 'finished' then meta.state = 'open' end
local state = state_now()
save_meta()
return {meta.fed, state, wake}
