-- acquire.lua: settle what one process has finished, then give start times to its oldest waiters.
--
-- KEYS     1 hash  the quota: `setup` (a msgpack map), `live`, `cooldowns`, `ramp`, `history`
--          2 hash  process -> sequence, last heard of, in flight, reply (packed: STORED, REPLY)
--          3 zset  process -> since when it waits
--          4 channel  "g:generation" and "f:process" (a slot is free for it)
-- ARGV     1 process   2 the numbers named below, as doubles
--          3 input, output tokens of each waiter, oldest first, as uint32 (empty: not limited)
-- returns  REPLY: generation, now, cooldown until, ask again in, day exhausted until (doubles),
--          flags, consecutive, version, then each start after now (uint32).  Times in microseconds.
--          flags: 1 tokens are limited, 2 concurrency is, 4 probe, 8 plain (nothing but rates),
--          16 a request is larger than a minute's worth, 32 waiters are held up by a limit
--
-- The same process and sequence again: the reply is repeated and nothing is done twice.
--
-- One sequence of steps, not functions: making a closure that captures what such a step needs takes
-- 1 to 3 us here, and a question takes 40. What is needed rarely is a function where it is needed.

local Q, PROCS, WAIT, CHANNEL = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me, estimates = ARGV[1], ARGV[3]
local sequence,
  held,                         -- tickets it holds
  mine,                         -- permits it holds, tickets included
  want, spare,                  -- tickets wanted by waiters, and by waiters to come
  known_gen, ok, late,          -- successes begun in known_gen and before it
  unused, reusable,             -- tickets given back, and those of them whose start lies ahead
  reusable_input, reusable_output,   -- ... with their tokens
  owed_input, owed_output,      -- tokens used beyond the reserved ones (negative: a refund)
  idle_input, idle_output,      -- reserved too much by first guesses, or by late starts (negative)
  refused_gen, retry_after,     -- generation of the newest refused call, its Retry-After; or -1
  overloads,
  day,                          -- the day is exhausted: its Retry-After, 0: not told; or -1
  probe_ended,                  -- 0, 1
  spare_input, spare_output     -- tokens of a ticket for waiters to come
  = struct.unpack('<ddddddddddddddddddddddd', ARGV[2])
local max, min, ceil = math.max, math.min, math.ceil

local STORED, REPLY = '<ddI4', '<dddddI4I4I4'
local SLICE, SLICE_SIZE = '<dI4', 12
local LOOK = 500000             -- starts are handed out this far ahead: a proof lasts 250 ms anyway
local SPARE_LOOK = 50000
local TURN = 150000             -- the next in line is waited for so long at most
local PATIENCE = 50000          -- between questions of a process whose turn it is not
local AGAIN = 900000            -- a waiter asks again by then, whatever it was told
-- Leases end on a clock that stands still while nobody is heard of for longer than the shorter one:
-- Redis was away, and those who had calls in flight have them still.
local LEASE = 10000000          -- a process not heard of for so long has lost its calls in flight
local WAIT_LEASE = 3000000      -- ... and does not count as waiting
local FORGET = 600000000        -- its last reply is kept for so long: it may ask again for that
local SET_BACK = 5000000        -- a clock that is so far behind was set
local SECOND = 800000           -- providers look at seconds too: the burst, and one request
local HEADROOM = 0.995          -- of a known rate: lets the provider's bucket fill up again
local BETA, C = 0.75, 1e-5      -- CUBIC: what is left after a cut, and how fast it comes back
local K = ((1 - BETA) / C) ^ (1 / 3)
local START_RATE = 10           -- a second, of a quota that nobody knows
local GAIN = 0.25               -- it grows by so much per success: doubles in three seconds
local LULL = 60000000           -- after so long without load a rate that was found is approached anew
local WINDOW = 60000000         -- providers' windows, but for the day's
local FEW = 5                   -- fewer calls than that say nothing of a window: others may have used it
local BREAKER = 5               -- cooldowns or overloads in a row that leave one probe at a time
local DAY = 86400000000
local TTL = 172800

-- Asked before? ----------------------------------------------------------------------------------

local stored, was_mine = redis.call('HGET', PROCS, me), 0
if stored then
  local done, _, calls, at = struct.unpack(STORED, stored)
  if done == sequence then return string.sub(stored, at) end
  was_mine = calls
end

local packed = redis.call('HMGET', Q, 'setup', 'live')
local c = packed[1] and cmsgpack.unpack(packed[1]) or {
  version = 0, rate_r = 0, rate_t = 0, rate_i = 0, rate_o = 0, per_day = 0, concurrency = 0,
  burst = 100000, horizon = 2000000, adaptive = 1, max_cooldown = 600000000,
  ramp_n = 0, ramp_repeats = 0,
}
local s = packed[2] and unpack_live(packed[2]) or {
  now = 0, gen = 0, run_id = '', saved = 0, cool_until = 0, consecutive = 0, success = 1,
  fails = 0, probe = '', probe_at = 0, ramp_i = -1, ramp_next = 0,
  tat = {0, 0, 0, 0},
  day_used = 0, day_reset = 0, day_until = 0, ceiling = 0, active = 0, limited = 0,
  rate = START_RATE, cycle_ok = 0, ok = 0, ok_since = 0, pace = 0, in_flight = 0, swept = 0,
  busy_since = 0, heard = 0,
}
local rates, look = {c.rate_r, c.rate_t, c.rate_i, c.rate_o}, min(c.horizon, LOOK)
local known = rates[1] + rates[2] + rates[3] + rates[4] > 0
local failing = s.fails > 0
local bumped = false            -- a new generation: what was handed out before it is void

-- Clock and restarts -----------------------------------------------------------------------------

local time = redis.call('TIME')
local now, before = time[1] * 1000000 + time[2], s.now
local forgotten = false         -- Redis may have forgotten its last second
if before - now > SET_BACK then
  -- The clock had been ahead, and all that lies ahead on it would be waited for.
  for _, name in ipairs({
    'cool_until', 'probe_at', 'ramp_next', 'limited', 'ok_since', 'busy_since', 'day_until',
  }) do
    s[name] = max(s[name] - (before - now), 0)
  end
  before, forgotten = now, true
  s.day_reset = min(s.day_reset, now - now % DAY + DAY)
  redis.call('HDEL', Q, 'history')
  redis.call('DEL', WAIT)
end
now = max(now, before)                  -- a little behind: it stands still
if before > 0 then s.heard = s.heard + min(now - before, WAIT_LEASE) end
if known_gen > s.gen then forgotten = true end  -- the process knows what Redis has lost
if s.gen == 0 then s.gen = now end
if now - before > 20000 then            -- no Redis restarts faster than that
  -- INFO is dear. LASTSAVE begins anew with the server too, but has whole seconds only.
  local saved = redis.pcall('LASTSAVE')
  if saved ~= s.saved or now / 1000000 - saved < 5 then
    local info = redis.pcall('INFO', 'server')
    local id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or s.run_id
    if s.run_id ~= '' and id ~= s.run_id then forgotten = true end
    s.saved, s.run_id = type(saved) == 'number' and saved or 0, id
  end
end
if forgotten then                       -- all tickets are void; wait until none of them counts
  s.gen, bumped = max(s.gen + 1, known_gen + 1, now), true
  s.cool_until = max(s.cool_until, now + c.horizon + 1000000)
  s.tat = {0, 0, 0, 0}
end
do -- the curve advances only while somebody waits for the rate
  local since, till = max(before > 0 and before or now, s.cool_until), min(now, s.limited)
  if till > since then s.active = s.active + (till - since) / 1000000 end
end
if s.ok_since == 0 then s.ok_since = now end
s.now = now

-- Of a known rate the share that is allowed, else starts a second.
local function pace()
  if c.adaptive == 0 then return known and 1 or 0 end
  if s.ceiling == 0 then return known and 1 or s.rate end
  local p = s.ceiling * max(BETA, 1 + C * (s.active - K) ^ 3)
  return known and min(p, 1) or p
end

-- Settling ---------------------------------------------------------------------------------------

if known_gen ~= s.gen then ok, late = 0, ok + late end
if s.probe == me and (probe_ended == 1 or mine == 0) then s.probe = '' end
if ok > 0 then s.consecutive, s.fails, s.success = 0, 0, 1 end
if ok + late > 0 then
  s.cycle_ok, s.ok = s.cycle_ok + ok + late, s.ok + ok + late
  if now - s.ok_since > 5000000 then
    -- Slices of some seconds, the newest first: when it began, how many calls succeeded in it.
    local history = redis.call('HGET', Q, 'history') or ''
    history = struct.pack(SLICE, s.ok_since, s.ok) .. string.sub(history, 1, 11 * SLICE_SIZE)
    redis.call('HSET', Q, 'history', history)
    s.ok_since, s.ok = now, 0
  end
  if c.adaptive == 1 and s.ceiling == 0 and not known and now - s.limited < 1000000 then
    s.rate = min(s.rate + GAIN * (ok + late), s.rate * 2)
  end
end

-- only a call that began after the last cooldown opens another one
if refused_gen >= s.gen and not bumped then
  -- the `row`-th of the quota's cooldowns; the last one repeats
  local function listed_cooldown(row)
    local listed = redis.call('HGET', Q, 'cooldowns') or '1,2,4,8,16,32,60'
    local i, found = 0, 0
    for seconds in string.gmatch(listed, '[^,]+') do
      i = i + 1
      if i <= row then found = tonumber(seconds) * 1000000 end
    end
    return found
  end

  local function cooldown_time()
    local wait = max(retry_after, 0)
    if c.adaptive == 0 or retry_after < 0 then
      wait = max(wait, listed_cooldown(s.consecutive))
    elseif s.consecutive > 2 then         -- it asked for too little twice
      wait = max(wait, listed_cooldown(s.consecutive - 2))
    end
    return min(wait, c.max_cooldown)
  end

  -- How many calls succeeded in the last `span` (us), and how much of it is on record.
  local function succeeded_in(span)
    local history, count, at, from = redis.call('HGET', Q, 'history') or '', s.ok, 1, s.ok_since
    while from > now - span and at < #history do
      local till, more = from, 0
      from, more, at = struct.unpack(SLICE, history, at)
      count = count + more * min((till - now + span) / max(till - from, 1), 1)
    end
    return count, min(now - from, span)
  end

  -- What a window let in that is used up now and opens again in `wait`.
  local function window_average(wait)
    if wait >= WINDOW then return s.cycle_ok / (s.active + wait / 1000000) end
    local count, covered = succeeded_in(WINDOW - wait)
    -- (Found for the first time, all that was ever sent counts: the rate grew meanwhile.)
    if s.ceiling > 0 then wait = wait * covered / (WINDOW - wait) end
    return count * 1000000 / (covered + wait)
  end

  local function cut(wait)
    local rate = pace()
    if not known then
      if s.ceiling == 0 and s.cycle_ok < FEW then    -- it goes on growing, from lower down
        s.rate, s.success = max(s.rate / 2, 1), 0
        return
      end
      if s.ceiling == 0 then rate = rate * 0.6 end
      if wait >= 2000000 and s.cycle_ok >= FEW then
        local average = window_average(wait)
        if rate > 2 * average then rate = average end
      end
    end
    s.ceiling, s.active, s.cycle_ok, s.success = max(rate, 0.01), 0, 0, 0
  end

  -- What was handed out ahead is void. No burst follows, and the first start comes a spacing after
  -- the end: the provider counts to the request that it refused, not to those sent meanwhile.
  local function void_tickets()
    local first = s.cool_until
    if c.adaptive == 1 then
      local per_second = known and pace() * rates[1] or pace()
      if per_second > 0 then first = first + min(1000000 / per_second, 1000000) end
    end
    for d = 1, 4 do
      if s.tat[d] > 0 then s.tat[d] = max(first, s.tat[d] - look) end
    end
  end

  s.consecutive, s.fails = s.consecutive + 1, s.fails + 1
  local wait = cooldown_time()
  if c.adaptive == 1 and s.success == 1 then cut(wait) end   -- one cut for a burst of refusals
  s.gen, bumped = max(s.gen + 1, now), true
  s.cool_until = max(s.cool_until, now + wait)
  void_tickets()
  s.ramp_i, s.ramp_next, s.limited = 0, s.cool_until, s.cool_until
end

if ok == 0 and overloads > 0 then
  s.fails = s.fails + overloads
  if s.fails >= BREAKER then
    s.probe_at = max(s.probe_at, now + min(1000000 * 2 ^ (s.fails - BREAKER), 30000000))
  end
end
if day >= 0 then
  if day < 600000000 then day = min(DAY - now % DAY, 3600000000) end
  s.day_until = max(s.day_until, now + day)
end
if c.per_day > 0 then
  if now >= s.day_reset then s.day_used, s.day_reset = 0, now - now % DAY + DAY end
  s.day_used = max(s.day_used - unused, 0)
end

-- Refill: what is owed moves the next start, what is given back lets it come sooner. But while first
-- guesses and late starts held the fleet up, the provider's bucket of a second was full and took in
-- no more: such tokens come back only where starts lie a second beyond those handed out now.
local dims, cost_of = {}, {}    -- limited dimensions (1 requests, 2 tokens, 3 input, 4 output)
do
  local p = pace()
  s.pace = p
  local factor = known and p * HEADROOM or 1
  if not known then rates[1] = p end
  if known_gen ~= s.gen or bumped then  -- a cooldown has voided them, and moved `tat` back
    reusable, reusable_input, reusable_output = 0, 0, 0
  end
  owed_input, owed_output = owed_input - reusable_input, owed_output - reusable_output
  local owed = {-reusable, owed_input + owed_output, owed_input, owed_output}
  local idle = {0, idle_input + idle_output, idle_input, idle_output}
  for d = 1, 4 do
    if rates[d] > 0 then
      local per = 1000000 / (rates[d] * factor)
      dims[#dims + 1], cost_of[d] = d, per
      local at = s.tat[d]
      at = max(at > 0 and at or now, now - c.burst)
      at = max(at + owed[d] * per, now - c.burst)
      if idle[d] < 0 then at = max(at + idle[d] * per, min(at, now + look + 1000000)) end
      s.tat[d] = at
    end
  end
end

-- Processes --------------------------------------------------------------------------------------

-- Once a second (while anybody is heard of): whose lease has ended, and how many calls are in flight.
local sweep = s.heard - s.swept >= 1000000
s.in_flight = s.in_flight - was_mine
if sweep then
  s.swept, s.in_flight = s.heard, 0
  local all = redis.call('HGETALL', PROCS)
  for i = 1, #all, 2 do
    if all[i] ~= me then
      local done, lease, calls, at = struct.unpack(STORED, all[i + 1])
      if s.heard > lease + LEASE then
        if s.heard > lease + FORGET then
          redis.call('HDEL', PROCS, all[i])
        elseif calls > 0 then
          redis.call('HSET', PROCS, all[i],
            struct.pack(STORED, done, lease, 0) .. string.sub(all[i + 1], at))
        end
        if s.probe == all[i] then s.probe = '' end
      else
        s.in_flight = s.in_flight + calls
      end
      if s.heard > lease + WAIT_LEASE then redis.call('ZREM', WAIT, all[i]) end
    end
  end
end
s.in_flight = max(s.in_flight, 0)

local waiting, queued = 1, false        -- processes that wait; we among them already
if want > 0 then
  waiting = redis.call('ZCARD', WAIT)   -- mostly nobody: then no more calls are needed
  queued = waiting > 0 and redis.call('ZSCORE', WAIT, me) and true
  if not queued then waiting = waiting + 1 end
else
  queued = stored                       -- perhaps
end

do
  local idle = true                     -- nothing is owed: the fleet asks for less than the rate
  for i = 1, #dims do
    if s.tat[dims[i]] > now then idle = false end
  end
  if idle or s.cool_until > now then s.busy_since = max(now, s.cool_until) end
  -- Probing beyond the ceiling begins anew after a lull: what was found then holds no more.
  if idle and s.active > K then s.active = K end
end

-- Start times ------------------------------------------------------------------------------------

local room = want + spare       -- how many tickets the day, the slots and the breaker leave
local why = 0                   -- what holds waiters up: 1 rate, 2 slots, 3 day, 4 cooldown or probe
local exhausted, again = 0, AGAIN
local has_share = false         -- we have our share of the slots: let others pass
if c.per_day > 0 and c.per_day - s.day_used < room then
  room, why = max(c.per_day - s.day_used, 0), 3
  if room == 0 and want > 0 then exhausted = s.day_reset end
end
if s.day_until > now then room, why, exhausted = 0, 3, s.day_until end
if #estimates == 0 and rates[2] + rates[3] + rates[4] > 0 and (want > 0 or known_gen ~= s.gen) then
  room, why, again = 0, 4, 0            -- it has not heard that tokens are limited now
end
if c.concurrency > 0 then
  local free = c.concurrency - s.in_flight - mine
  if waiting > 1 then
    local ahead = queued and redis.call('ZRANK', WAIT, me) or waiting - 1
    local share = max(ceil(c.concurrency / waiting), 1) - mine
    has_share = share <= 0
    free = min(free - min(ahead, free), share)
  end
  if free < room then room, why = max(free, 0), 2 end
end

local base = max(now, s.cool_until, s.ramp_next)   -- nobody overtakes a slow start
local open = s.fails >= BREAKER
if open then
  base = max(base, s.probe_at)
  if s.probe ~= '' or base > now + look then room, why = 0, 4 else room = min(room, 1) end
end

local ramp                      -- the spacings (us) of a slow start that is under way
if s.ramp_i >= 0 and c.adaptive == 0 and c.ramp_n > 0
  and (s.ramp_i < c.ramp_n or c.ramp_repeats ~= 0) then
  ramp = {}
  for seconds in string.gmatch(redis.call('HGET', Q, 'ramp') or '', '[^,]+') do
    ramp[#ramp + 1] = tonumber(seconds) * 1000000
  end
end

-- Start, then pay: the start is when all that was started before is paid, whatever this one costs.
-- (The one hot loop: comparisons in place of calls of min and max.)
local starts, n, last, spent, oversize = {}, 0, now, 0, false
do
  local tat, burst, count = s.tat, c.burst, #dims
  local costs, share, max_ahead = {}, look / waiting, max(burst, SECOND)
  local horizon = now + look
  -- Processes take turns with the last share of the horizon, or the nearest to Redis would be the
  -- first whenever there is room. Who is next may be TURN away from it.
  local frontier = horizon
  if waiting > 1 and count > 0 and not (queued and redis.call('ZRANK', WAIT, me) == 0) then
    frontier = horizon - max(share, min(TURN, look / 2))
  end
  local tokens, input, output = nil, spare_input, spare_output
  if #estimates > 0 then
    tokens = {struct.unpack('<' .. string.rep('I4', #estimates / 4), estimates)}
  end
  while n < room do
    if tokens then
      if n < want then
        input, output = tokens[2 * n + 1], tokens[2 * n + 2]
      else
        input, output = spare_input, spare_output
      end
    end
    local start, step, large = base, 0, false
    for i = 1, count do
      local d = dims[i]
      local at, cost = tat[d], cost_of[d]
      if at > start then start = at end
      if d == 2 then cost = cost * (input + output) elseif d == 3 then cost = cost * input
      elseif d == 4 then cost = cost * output end
      costs[i] = cost
      if cost > step then step = cost end
      if d > 1 and cost > 60000000 then large = true end
    end
    if ramp then
      if s.ramp_i >= c.ramp_n and c.ramp_repeats == 0 then
        ramp, base = nil, max(base, s.ramp_next)
        start = max(start, base)
      elseif s.ramp_i > 0 then
        start = max(start, s.ramp_next + ramp[min(s.ramp_i + 1, #ramp)])
      end
    end
    if n >= want and start > now + SPARE_LOOK then break end
    if start > frontier then
      why, again = start > base and 1 or 4, start - frontier
      if start > base and frontier < horizon then again = max(again, PATIENCE) end
      break
    end
    if waiting > 1 and n + held > 0 and (n + held) * (spent + step) / (n + 1) >= share then
      why, again = 1, share / 2
      break
    end
    if large then oversize = true end
    spent = spent + step
    for i = 1, count do
      local d, cost = dims[i], costs[i]
      local at, ahead = tat[d], max_ahead - cost
      if ahead < 0 then ahead = 0 end
      local earliest = start - (ahead < burst and ahead or burst)
      if at < earliest then at = earliest end
      tat[d] = at + cost
    end
    if ramp then s.ramp_i, s.ramp_next = s.ramp_i + 1, start end
    n = n + 1
    starts[n] = start - now + 1           -- whole microseconds, never early
    if n <= want then last = start end
  end
end
if open and n > 0 then s.probe = me end
if c.per_day > 0 then s.day_used = s.day_used + n end
mine = mine + n
s.in_flight = s.in_flight + mine

local given = min(n, want)
if given == want then
  if queued then redis.call('ZREM', WAIT, me) end
elseif not queued or has_share or given > 0 then
  redis.call('ZADD', WAIT, now, me)       -- served: to the end of the line
end

-- The rate is what holds the fleet up if starts have lain ahead for a while without a gap: a pair
-- of requests that came together is no sign of it.
if given > 0 and last <= now + 1000 and why ~= 1 then s.busy_since = now end
if want > 0 and now - s.busy_since >= max(250000, 4 * spent / max(n, 1)) then
  if not known and s.limited > 0 and now > s.limited then
    s.active = min(s.active, max(K * (1 - (now - s.limited) / LULL), 0))
  end
  for i = 1, #dims do s.limited = max(s.limited, s.tat[dims[i]]) end
end

-- Tell, remember and answer ----------------------------------------------------------------------

if bumped then redis.call('PUBLISH', CHANNEL, string.format('g:%.0f', s.gen)) end
if c.concurrency > 0 and s.in_flight < c.concurrency       -- a slot is free, for others than us
    and (mine < was_mine + n or has_share and want > 0)
  or open and s.probe == '' or failing and s.fails == 0 then                   -- the breaker closed
  local first = redis.call('ZRANGE', WAIT, 0, 0)[1]
  if first and first ~= me then redis.call('PUBLISH', CHANNEL, 'f:' .. first) end
end

if why == 4 and base > now + look then again = base - look - now end
local plain = c.concurrency == 0 and c.per_day == 0 and not open and not ramp
  and s.cool_until <= now
local flags = (rates[2] + rates[3] + rates[4] > 0 and 1 or 0) + (c.concurrency > 0 and 2 or 0)
  + (open and 4 or 0) + (plain and 8 or 0) + (oversize and 16 or 0) + (given < want and 32 or 0)
local reply = struct.pack(REPLY .. string.rep('I4', n), s.gen, now, s.cool_until,
  max(min(again, AGAIN), 1000), exhausted, flags, s.consecutive, c.version, unpack(starts))
local new = redis.call('HSET', PROCS, me, struct.pack(STORED, sequence, s.heard, mine) .. reply)
redis.call('HSET', Q, 'live', pack_live(s))
if sweep or new == 1 or given < want and not queued then
  local ttl = TTL + max(ceil((s.day_until - now) / 1000000), 0)
  redis.call('EXPIRE', Q, ttl)
  redis.call('EXPIRE', PROCS, ttl)
  redis.call('EXPIRE', WAIT, ttl)
end
return reply
