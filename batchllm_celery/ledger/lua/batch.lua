-- batch.lua: what every script of the ledger includes.
--
-- KEYS     the keys of one batch in the order of `keys.BatchKeys`
-- A script that is not `create` answers false, and writes nothing, when the batch has no meta:
-- a late write would bring an expired key back without a TTL.
--
-- Every item that is fed and has no outcome is in `ready` (any process may claim it), in `held`
-- (a living process holds it), or in both (its process had stalled for a lease, and no other has
-- claimed it yet). `done` has a bit for each outcome, `failed` for each failure among them,
-- `stopped` for each failure that a control decision caused.
local META, ITEM, FP, READY, HELD, PROCS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local ATTEMPTS, DONE, FAILED, OUT, STOPPED = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local CALLS = KEYS[12]
-- Large values of payloads, once by content: SHA-256 -> bytes; item -> the SHAs of its payload, 32
-- bytes each; SHA -> items that need it. An item is counted where its payload is stored, and
-- uncounted where that goes, so that retries and repeated calls can't count twice.
local BLOB, USES, REFS = KEYS[13], KEYS[14], KEYS[15]
-- Of standing batches only.
local IDS, PLACES, TASKS, OWED = KEYS[16], KEYS[17], KEYS[18], KEYS[19]
local call = redis.call

local clock = call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000) -- milliseconds

local AT_ONCE = 0   -- score in `ready` of items that were released or lost: requeued first
local STAMP = 21    -- bytes before a payload: 13 of feeding time, 8 of fingerprint
local OWED_AFTER = 30000 -- ms after which a Celery task whose item is done is sent again
local LOST, CALLING, CLAIMED = 'x', 'p', 'c'

local NUMBERS = {
  'fed', 'ok', 'failed', 'stopped', 'round', 'rev', 'ttl', 'max_deliveries', 'keep',
  'total', 'parked_until', 'deadline', 'deadline_at', 'token_budget', 'max_cost',
  'spent', 'cost', 'priced', 'input', 'output', 'cached', 'maybe_billed',
  'item_bytes', 'kept_bytes', 'out_count', 'out_bytes', 'read_count', 'read_bytes',
  'reopen_at', 'submitted_at', 'kept_limit', 'max_calls', 'blob_bytes', 'standing',
  'hook', 'hook_at', 'hook_round',
}
local WORDS = {'state', 'fail_fast', 'reopen'}
-- Fields that `create` writes. A batch without one of them is broken.
local ALWAYS = {'fed', 'ok', 'failed', 'stopped', 'round', 'rev', 'ttl', 'max_deliveries', 'keep',
                'spent', 'cost', 'priced', 'input', 'output', 'cached', 'maybe_billed', 'item_bytes',
                'kept_bytes', 'out_count', 'out_bytes', 'read_count', 'read_bytes', 'kept_limit',
                'submitted_at', 'fail_fast'}
local STATES = {open = 1, paused = 1, finished = 1, cancelled = 1, deadline = 1, budget = 1,
                aborted = 1}
local meta, loaded = {}, {}

-- Refuse a batch in which somebody else wrote, or of which Redis lost a part.
local function broken(name)
  error('BROKEN ' .. name .. ' script: ')
end

local function load_meta()
  local names = {}
  for i = 1, #NUMBERS do names[i] = NUMBERS[i] end
  for i = 1, #WORDS do names[#NUMBERS + i] = WORDS[i] end
  local values = call('HMGET', META, unpack(names))
  for i = 1, #names do
    local value = values[i] or nil
    if i <= #NUMBERS and value then
      value = tonumber(value)
      if not value or value ~= value or math.abs(value) > 2 ^ 62 then broken(names[i]) end
    end
    meta[names[i]], loaded[names[i]] = value, value
  end
  if not meta.state then
    if call('EXISTS', META) == 1 then broken('state') end
    return false
  end
  if not STATES[meta.state] then broken('state') end
  for i = 1, #ALWAYS do
    if not meta[ALWAYS[i]] then broken(ALWAYS[i]) end
  end
  return true
end

-- Most batches have no blobs, and most are no standing ones.
local function keys_in_use()
  if meta.standing then return #KEYS end
  return meta.blob_bytes and 15 or 12
end

-- Refuse a batch in which a key is not of its type: a script that meets such a key half way has
-- written one half, and a call whose outcome can't be recorded is paid for in vain. It costs 10
-- microseconds, so a worker asks for it once a second.
local TYPES = {'hash', 'hash', 'string', 'zset', 'hash', 'hash', 'hash', 'string', 'string', 'stream',
               'string', 'hash', 'hash', 'hash', 'hash', 'hash', 'hash', 'hash', 'zset'}
local function check_keys()
  for i = 1, keys_in_use() do
    local found = call('TYPE', KEYS[i]).ok
    if found ~= TYPES[i] and found ~= 'none' then broken('key is a ' .. found) end
  end
end

local function text(value)
  if type(value) ~= 'number' then return value end
  if value == math.floor(value) then return string.format('%.0f', value) end
  return string.format('%.17g', value)
end

-- Write what has changed in `meta`, and give all keys the batch's TTL.
local function save_meta()
  local changes = {}
  for i = 1, #NUMBERS + #WORDS do
    local name = NUMBERS[i] or WORDS[i - #NUMBERS]
    if meta[name] ~= loaded[name] then
      if meta[name] == nil then
        call('HDEL', META, name)
      else
        changes[#changes + 1] = name
        changes[#changes + 1] = text(meta[name])
      end
      loaded[name] = meta[name]
    end
  end
  if #changes > 0 then call('HSET', META, unpack(changes)) end
  -- Looking at a batch that is over must not keep it for ever.
  if #changes > 0 or not meta.total or meta.ok + meta.failed < meta.total then
    -- A standing batch is kept longer while items wait than when all have their outcome.
    local waits = meta.standing and meta.ok + meta.failed < meta.fed
    for i = 1, keys_in_use() do
      call('EXPIRE', KEYS[i], waits and meta.standing or meta.ttl)
    end
  elseif call('TTL', PROCS) == -1 then -- a late call of a worker has created it again
    call('EXPIRE', PROCS, meta.ttl)
  end
end

local function is_stopped()
  return meta.state ~= 'open' and meta.state ~= 'paused' and meta.state ~= 'finished'
end

local function over_budget()
  return (meta.token_budget and meta.spent >= meta.token_budget)
    or (meta.max_cost and meta.cost >= meta.max_cost)
end

-- The state at this moment: flips what time, spending or the last outcome have changed.
local function state_now()
  if meta.state == 'open' or meta.state == 'paused' then
    if meta.total and not meta.reopen and meta.ok + meta.failed >= meta.total then
      meta.state = 'finished'
    elseif meta.deadline_at and NOW >= meta.deadline_at then
      meta.state = 'deadline'
    elseif over_budget() then
      meta.state = 'budget'
    end
  end
  if meta.state ~= 'open' then return meta.state end
  if meta.parked_until and meta.parked_until > NOW then return 'parked' end
  return meta.total and 'running' or 'feeding'
end

-- `command key values...` however many there are (Lua's stack holds about 8,000).
local function in_chunks(command, key, values)
  for first = 1, #values, 4000 do
    call(command, key, unpack(values, first, math.min(first + 3999, #values)))
  end
end

local function append(fields)
  local bytes = 0
  for i = 2, #fields, 2 do bytes = bytes + #fields[i] end
  meta.out_count = meta.out_count + 1
  meta.out_bytes = meta.out_bytes + bytes
  local count = text(meta.out_count) .. ':' .. text(meta.out_bytes)
  local place = call('XADD', OUT, '*', 'b', count, unpack(fields))
  if not meta.standing then return end
  -- Who waits for this item alone looks for its place when the channel names it.
  call('HSET', PLACES, fields[2], place)
  if call('HEXISTS', TASKS, fields[2]) == 1 then call('ZADD', OWED, NOW + OWED_AFTER, fields[2]) end
  call('PUBLISH', string.sub(META, 1, -5) .. 'done', fields[2])
end

local SHA = 32 -- bytes of one in `uses`

local function remove_blob(sha)
  meta.blob_bytes = meta.blob_bytes - call('HSTRLEN', BLOB, sha)
  call('HDEL', BLOB, sha)
  call('HDEL', REFS, sha)
end

-- Adds to `missing` the SHAs in `uses` of which no blob is stored, each once.
local function missing_blobs(uses, missing)
  for at = 1, #uses, SHA do
    local sha = string.sub(uses, at, at + SHA - 1)
    if not missing[sha] and call('HEXISTS', BLOB, sha) == 0 then
      missing[sha] = true
      missing[#missing + 1] = sha
    end
  end
end

-- The blobs that an item's payload needs from now on: those of a new one are counted before those of
-- the old one are uncounted, or what both need would go.
local function set_uses(index, uses)
  if not meta.blob_bytes then return end -- no payload of this batch has ever had one
  local old = call('HGET', USES, index) or ''
  if uses == old then return end
  if uses == '' then call('HDEL', USES, index) else call('HSET', USES, index, uses) end
  for at = 1, #uses, SHA do call('HINCRBY', REFS, string.sub(uses, at, at + SHA - 1), 1) end
  for at = 1, #old, SHA do
    local sha = string.sub(old, at, at + SHA - 1)
    if call('HINCRBY', REFS, sha, -1) <= 0 then remove_blob(sha) end
  end
end

-- Whether the payload of a failure may stay, of this many bytes, for a retry.
local function may_keep(size)
  return meta.kept_bytes + size <= meta.kept_limit and (meta.blob_bytes or 0) <= meta.kept_limit
end

-- The item's payload goes, or stays under a cap for a later retry of the failure.
local function drop_payload(index, size, keep)
  if size == 0 then return end
  meta.item_bytes = meta.item_bytes - size
  if keep and may_keep(size) then
    meta.kept_bytes = meta.kept_bytes + size
  else
    call('HDEL', ITEM, index)
    set_uses(index, '')
  end
end

local function mark(index, success, control)
  call('SETBIT', DONE, index, 1)
  if success then
    meta.ok = meta.ok + 1
    return
  end
  call('SETBIT', FAILED, index, 1)
  meta.failed = meta.failed + 1
  if control then
    call('SETBIT', STOPPED, index, 1)
    meta.stopped = meta.stopped + 1
  end
end

-- Of an item that is not at its first attempt: deaths of processes in its calls (losses), round,
-- and what `codec.Attempts` wrote.
local function history(entry)
  if not entry then return 0, 0, '' end
  local losses, round, rest = string.match(entry, '^(%d+) (%d+) (.*)$')
  return tonumber(losses), tonumber(round), rest
end

local function history_text(losses, round, rest)
  return text(losses) .. ' ' .. text(round) .. ' ' .. rest
end

-- Provider calls of an item in this round, how many of them were cut off, and by what the last was.
local function calls_of(entry)
  local begun, cut, why = string.match(entry or '', '^(%d+) (%d+) (%S+)$')
  return tonumber(begun) or 0, tonumber(cut) or 0, why or '-'
end

local function calls_text(begun, cut, why)
  return text(begun) .. ' ' .. text(cut) .. ' ' .. why
end

-- A call that `begin` admitted has not been made.
local function uncount_call(index)
  local begun, cut, why = calls_of(call('HGET', CALLS, index))
  call('HSET', CALLS, index, calls_text(math.max(0, begun - 1), cut, why))
end

-- A process that claims, begins or saves is alive. From now on its heartbeat is watched, whether it
-- has sent one or not (it sends none while it holds nothing). What is written is the time: a counter
-- that took the same value again would look stalled since the first time. This is no heartbeat: a
-- process that was given up stays LOST until its next one, after which it reclaims its items.
-- Meanwhile the change ends an `expire` that is under way.
local function note_alive(process)
  local last = call('HGET', PROCS, process)
  local given_up = not last or string.sub(last, 1, 1) == LOST
  call('HSET', PROCS, process, (given_up and LOST or '') .. text(NOW))
end

-- An outcome that no worker wrote: the reader makes its line from the payload's head. The caller
-- removes the item from `ready`, `held` and `attempts` (many at once).
local function write_outcome(index, kind, control, entry, calls)
  local stored = call('HGET', ITEM, index) or ''
  local head = string.sub(stored, STAMP + 1, (string.find(stored, '\n', STAMP + 1, true) or 0) - 1)
  append({'i', index, 'k', kind, 'h', head, 't', entry or '', 'c', calls or ''})
  mark(index, false, control)
  drop_payload(index, #stored, true)
  return #stored
end
