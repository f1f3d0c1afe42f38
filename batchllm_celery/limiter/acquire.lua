-- acquire.lua: settle what one process has finished, then give start times to its oldest waiters.
--
-- KEYS     1 hash  the quota: limits, buckets, cooldown, curve
--          2 hash  process -> sequence|lease|in flight|reply
--          3 zset  process -> since when it waits
--          4 channel  "g:generation" and "f:process" (a slot is free for it)
-- ARGV     1 process   2 sequence   3 tickets it holds   4 permits it holds (tickets included)
--          5 tickets wanted by waiters   6 tickets wanted for waiters to come
--          7 generation of 8   8 successes that began in it   9 successes that began before it
--          10 sum of the latencies of 8 and 9 (us)   11 tickets given back
--          12 input and 13 output tokens used beyond the reserved ones (negative: a refund)
--          14 generation of the newest refused call, or -1   15 its Retry-After (us), or -1
--          16 overloads   17 day exhausted: -1, or its Retry-After (us, 0: not told)
--          18 the probe has ended (0, 1)
--          19 tickets dropped because their generation had passed (step 3 has freed them already)
--          20 input and 21 output tokens of a ticket for waiters to come
--          22.. input, output tokens of each waiter, oldest first (none: no tokens are limited)
-- returns  generation|now|cooldown until|ask again in|day exhausted until|flags|consecutive|version
--          |start times after now, separated by commas.  All times in microseconds.
--          flags: 1 tokens are limited, 2 concurrency is, 4 probe, 8 plain (nothing but rates),
--          16 a request is larger than a minute's worth, 32 waiters are held up by a limit
--
-- The same process and sequence again: the reply is repeated and nothing is done twice.

local Q, PROCS, WAIT, CHANNEL = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me, sequence = ARGV[1], ARGV[2]

local LOOK = 500000             -- starts are handed out this far ahead: a proof lasts 250 ms anyway
local SPARE_LOOK = 50000
local AGAIN = 900000            -- a waiter asks again by then, whatever it was told
local LEASE = 10000000          -- a process not heard of for so long has lost its calls in flight
local WAIT_LEASE = 3000000      -- ... and does not count as waiting
local HEADROOM = 0.995          -- of a known rate: lets the provider's bucket fill up again
local BETA, C = 0.75, 1e-5      -- CUBIC: what is left after a cut, and how fast it comes back
local K = ((1 - BETA) / C) ^ (1 / 3)
local START_RATE = 10           -- a second, of a quota that nobody knows
local GAIN = 1                  -- such a rate grows by GAIN starts per success and latency
local BREAKER = 5               -- cooldowns or overloads in a row that leave one probe at a time
local DAY = 86400000000

local seen = redis.call('HGET', PROCS, me)
if seen then
  local last = string.match(seen, '^([^|]*)|')
  if last == sequence then
    return (string.gsub(seen, '^[^|]*|[^|]*|[^|]*|', '', 1))
  end
end

local q = redis.call('HMGET', Q,
  'version', 'rate_r', 'rate_t', 'rate_i', 'rate_o', 'per_day', 'concurrency', 'burst', 'horizon',
  'adaptive', 'max_cooldown', 'ramp_n', 'ramp_repeats',
  'now', 'run_id', 'gen', 'cool_until', 'consecutive', 'success', 'fails', 'probe', 'probe_at',
  'ramp_i', 'ramp_next', 'tat_r', 'tat_t', 'tat_i', 'tat_o', 'cr_r', 'cr_t', 'cr_i', 'cr_o',
  'day_used', 'day_reset', 'day_until', 'ceiling', 'active', 'limited', 'rate', 'cycle_ok',
  'in_flight', 'swept', 'pace', 'busy_since')
local num = tonumber
local version = num(q[1]) or 0
local rates = {num(q[2]) or 0, num(q[3]) or 0, num(q[4]) or 0, num(q[5]) or 0}
local per_day, concurrency = num(q[6]) or 0, num(q[7]) or 0
local tau, look = num(q[8]) or 100000, num(q[9]) or 2000000
local horizon = look
local adaptive, max_cooldown = (q[10] or '1') == '1', num(q[11]) or 600000000
local ramp_n, ramp_repeats = num(q[12]) or 0, q[13] == '1'
local before, run_id, gen = num(q[14]), q[15] or '', num(q[16])
local cool_until, consecutive, success = num(q[17]) or 0, num(q[18]) or 0, q[19] ~= '0'
local fails, probe, probe_at = num(q[20]) or 0, q[21] or '', num(q[22]) or 0
local ramp_i, ramp_next = num(q[23]) or -1, num(q[24]) or 0
local tat = {num(q[25]), num(q[26]), num(q[27]), num(q[28])}
local credit = {num(q[29]) or 0, num(q[30]) or 0, num(q[31]) or 0, num(q[32]) or 0}
local day_used, day_reset, day_until = num(q[33]) or 0, num(q[34]) or 0, num(q[35]) or 0
local ceiling, active, limited = num(q[36]) or 0, num(q[37]) or 0, num(q[38]) or 0
local rate, cycle_ok = num(q[39]) or START_RATE, num(q[40]) or 0
local in_flight, swept, busy_since = num(q[41]) or 0, num(q[42]) or 0, num(q[44]) or 0
if look > LOOK then look = LOOK end

-- 1. The clock never goes back; a Redis that restarted has forgotten up to a second.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if before and now < before then now = before end
local known_gen = num(ARGV[7])
local bumped = false
local function hold()
  if gen and now > gen then gen = now else gen = (gen or now) + 1 end
  cool_until = math.max(cool_until, now + horizon + 1000000)
  tat, credit = {}, {0, 0, 0, 0}
  bumped = true
end
if not gen then
  gen = now
  if known_gen > 0 then hold() end        -- the process knows a quota that Redis has lost
end
if not before or now - before > 20000 then  -- no Redis restarts faster than that
  local info = redis.pcall('INFO', 'server')
  local id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
  if run_id ~= '' and id ~= '' and id ~= run_id then hold() end
  if id ~= '' then run_id = id end
end
local since = math.max(before or now, cool_until)
if math.min(now, limited) > since then                    -- only time in which somebody waits for the rate counts
  active = active + (math.min(now, limited) - since) / 1000000
end

-- 2. Settle.
local ok, late = num(ARGV[8]), num(ARGV[9])
if known_gen ~= gen then ok, late = 0, ok + late end
local refused = num(ARGV[14])
if probe == me and (num(ARGV[18]) == 1 or num(ARGV[4]) == 0) then probe = '' end
if ok > 0 then consecutive, fails, success = 0, 0, true end
local rate_known = rates[1] + rates[2] + rates[3] + rates[4] > 0

local function pace()
  if not adaptive then return rate_known and 1 or 0 end
  local p = rate_known and 1 or rate
  if ceiling > 0 then
    p = ceiling * math.max(BETA, 1 + C * (active - K) ^ 3)
    if rate_known and p > 1 then p = 1 end
  end
  return p
end

if ok + late > 0 then
  cycle_ok = cycle_ok + ok + late
  if adaptive and ceiling == 0 and not rate_known and now - limited < 1000000 then
    local latency = num(ARGV[10]) / (ok + late) / 1000000
    latency = math.min(math.max(latency, 0.25), 2)
    rate = math.min(rate + GAIN * (ok + late) / latency, rate * 2)
  end
end
if refused >= gen and not bumped then
  local asked = num(ARGV[15])
  consecutive, fails = consecutive + 1, fails + 1
  local wait = math.max(asked, 0)
  if not adaptive or asked < 0 or consecutive > 2 then
    local row = adaptive and asked >= 0 and consecutive - 2 or consecutive
    local listed = redis.call('HGET', Q, 'cooldowns') or '1,2,4,8,16,32,60'
    local i = 0
    for seconds in string.gmatch(listed, '[^,]+') do
      i = i + 1
      if i <= row then asked = num(seconds) * 1000000 end
    end
    wait = math.max(wait, asked)
  end
  wait = math.min(wait, max_cooldown)
  if adaptive and success then             -- one cut for a burst of refusals
    local cut = pace()
    if ceiling == 0 and not rate_known then cut = cut * 0.6 end
    if ceiling > 0 and active < 3 then cut = cut * 0.7 end   -- the last cut was not enough
    if not rate_known and wait >= 2000000 then   -- a window is used up: its average is the quota
      local average = cycle_ok / (active + wait / 1000000)
      if cut > 2 * average then cut = average end
    end
    ceiling, active, cycle_ok, success = math.max(cut, 0.01), 0, 0, false
  end
  gen = math.max(gen + 1, now)
  cool_until = math.max(cool_until, now + wait)
  -- What was handed out ahead is void. No burst follows, and the first start comes a spacing after
  -- the end: the provider counts to the request that it refused, not to those sent meanwhile.
  local first = cool_until
  if adaptive then
    local per_second = pace()
    if rate_known then per_second = per_second * rates[1] end
    if per_second > 0 then first = first + math.min(1000000 / per_second, 1000000) end
  end
  for d = 1, 4 do
    if tat[d] then tat[d] = math.max(first, tat[d] - look) end
  end
  ramp_i, ramp_next, bumped = 0, cool_until, true
  limited = 0
end
if ok == 0 and num(ARGV[16]) > 0 then
  fails = fails + num(ARGV[16])
  if fails >= BREAKER then
    probe_at = math.max(probe_at, now + math.min(1000000 * 2 ^ (fails - BREAKER), 30000000))
  end
end
local day = num(ARGV[17])
if day >= 0 then
  local midnight = now - now % DAY + DAY
  if day < 600000000 then day = math.min(midnight - now, 3600000000) end
  day_until = math.max(day_until, now + day)
end
local unused = num(ARGV[11])
if per_day > 0 then
  if now >= day_reset then day_used, day_reset = 0, now - now % DAY + DAY end
  day_used = math.max(day_used - unused - num(ARGV[19]), 0)
end

-- 3. Buckets: what is owed moves the next start, what is given back makes later ones cheaper.
local p = pace()
if rate_known then
  for d = 1, 4 do rates[d] = rates[d] * p * HEADROOM end
else
  rates[1] = p
end
local din, dout = num(ARGV[12]), num(ARGV[13])
local owed = {-unused, din + dout, din, dout}
local dims, cost_of = {}, {}
for d = 1, 4 do
  if rates[d] > 0 then
    dims[#dims + 1] = d
    local per = 1000000 / rates[d]
    cost_of[d] = per
    local at = math.max(tat[d] or now, now - tau)
    local back = credit[d]
    if owed[d] < 0 then back = back - owed[d] * per else at = at + owed[d] * per end
    tat[d], credit[d] = at, math.max(math.min(back, at - now + tau), 0)
  end
end
local by_tokens = rates[2] + rates[3] + rates[4] > 0

-- 4. Who waits, and whose lease has ended.
local want, spare = num(ARGV[5]), num(ARGV[6])
local held, mine = num(ARGV[3]), num(ARGV[4])
local was_mine = seen and num(string.match(seen, '^[^|]*|[^|]*|([^|]*)|')) or 0
in_flight = in_flight - was_mine
local sweep = now - swept >= 1000000
if sweep then
  swept = now
  local all, total = redis.call('HGETALL', PROCS), 0
  for i = 1, #all, 2 do
    if all[i] ~= me then
      local lease, calls = string.match(all[i + 1], '^[^|]*|([^|]*)|([^|]*)|')
      if now > num(lease) + LEASE then
        redis.call('HDEL', PROCS, all[i])
        if probe == all[i] then probe = '' end
      else
        total = total + num(calls)
      end
      if now > num(lease) + WAIT_LEASE then redis.call('ZREM', WAIT, all[i]) end
    end
  end
  in_flight = total
end
in_flight = math.max(in_flight, 0)
local waiting, added = 1, 0
if want > 0 then
  added = redis.call('ZADD', WAIT, 'NX', now, me)
  waiting = redis.call('ZCARD', WAIT)
end

-- 5. Give start times.
local room = want + spare
local behind = true
for i = 1, #dims do
  if tat[dims[i]] > now then behind = false end
end
if behind or cool_until > now then
  busy_since = math.max(now, cool_until)
  -- Probing beyond the ceiling begins anew after a lull: what was found then holds no more.
  if behind and active > K then active = K end
end
local why = 0                               -- 1 rate, 2 slots, 3 day, 4 cooldown or probe
local base = math.max(now, cool_until, ramp_next)  -- nobody overtakes a slow start
if per_day > 0 and per_day - day_used < room then
  room, why = math.max(per_day - day_used, 0), 3
end
local exhausted = day_until
if day_until > now then room, why = 0, 3
elseif why == 3 and room < want then exhausted = day_reset
else exhausted = 0 end
if concurrency > 0 then
  local free = concurrency - in_flight - mine
  if waiting > 1 then
    local ahead = redis.call('ZRANK', WAIT, me) or 0
    free = math.min(free - math.min(ahead, free), math.max(math.ceil(concurrency / waiting), 1) - mine)
  end
  if free < room then room, why = math.max(free, 0), 2 end
end
local open = fails >= BREAKER
if open then
  base = math.max(base, probe_at)
  if probe ~= '' or base > now + look then room, why = 0, 4 else room = math.min(room, 1) end
end
local ramp
if ramp_i >= 0 and not adaptive and ramp_n > 0 and (ramp_i < ramp_n or ramp_repeats) then
  ramp = {}
  for seconds in string.gmatch(redis.call('HGET', Q, 'ramp') or '', '[^,]+') do
    ramp[#ramp + 1] = num(seconds) * 1000000
  end
end
local share = look / waiting
local starts, n, first_at, oversize, again = {}, 0, now, false, AGAIN
local last, spent = now, 0
local tokens = ARGV[22] ~= nil
while n < room do
  local input, output
  if n < want and tokens then
    input, output = num(ARGV[22 + 2 * n]) or 0, num(ARGV[23 + 2 * n]) or 0
  else
    input, output = num(ARGV[20]), num(ARGV[21])
  end
  local start = base
  for i = 1, #dims do
    local at = tat[dims[i]]
    if at > start then start = at end
  end
  local delay = 0
  if ramp then
    if ramp_i >= ramp_n and not ramp_repeats then
      ramp = nil
    else
      delay = ramp_i == 0 and 0 or ramp[math.min(ramp_i + 1, #ramp)]
      start = math.max(start, ramp_next + delay)
    end
  end
  if n >= want and start > now + SPARE_LOOK then break end
  if start > now + look then
    why, again = start > base and 1 or 4, start - look - now
    break
  end
  local step = 0
  for i = 1, #dims do
    local d = dims[i]
    local c = (d == 1 and 1 or d == 2 and input + output or d == 3 and input or output) * cost_of[d]
    if c > 60000000 then oversize = true end
    if c > step then step = c end
  end
  if waiting > 1 and n + held > 0 and (n + held) * (spent + step) / (n + 1) >= share then
    why, again = 1, share / 2
    break
  end
  spent = spent + step
  for i = 1, #dims do
    local d = dims[i]
    local c = (d == 1 and 1 or d == 2 and input + output or d == 3 and input or output) * cost_of[d]
    local back = math.min(credit[d], c * (d == 1 and 0.5 or 0.75))
    credit[d] = credit[d] - back
    tat[d] = math.max(tat[d], start - tau) + c - back
  end
  if ramp then ramp_i, ramp_next = ramp_i + 1, start end
  n = n + 1
  starts[n] = math.ceil(start - now)
  if n <= want then last = start end
end
if open and n > 0 then probe = me end
if per_day > 0 then day_used = day_used + n end
mine = mine + n
local given = math.min(n, want)
if given == want then
  if waiting > 1 or added == 1 or seen then redis.call('ZREM', WAIT, me) end
elseif concurrency > 0 and given > 0 then
  redis.call('ZADD', WAIT, 'XX', now, me)   -- served: to the end of the line
end
-- The rate is what holds the fleet up if starts have lain ahead for a while without a gap: a pair of
-- requests that came together is no sign of it.
if given > 0 and last <= now + 1000 and why ~= 1 then busy_since = now end
if want > 0 and now - busy_since >= math.max(250000, 4 * spent / math.max(n, 1)) then
  for i = 1, #dims do
    if tat[dims[i]] > limited then limited = tat[dims[i]] end
  end
end
in_flight = in_flight + mine

-- 6. Tell the others, remember, answer.
if bumped then redis.call('PUBLISH', CHANNEL, string.format('g:%.0f', gen)) end
if concurrency > 0 and in_flight < concurrency and mine < was_mine + n then
  local first = redis.call('ZRANGE', WAIT, 0, 0)[1]
  if first and first ~= me then redis.call('PUBLISH', CHANNEL, 'f:' .. first) end
end
if open and probe == '' or (fails == 0 and q[20] and q[20] ~= '0') then
  local first = redis.call('ZRANGE', WAIT, 0, 0)[1]
  if first and first ~= me then redis.call('PUBLISH', CHANNEL, 'f:' .. first) end
end
if why == 4 and base > now + look then again = base - look - now end
local plain = concurrency == 0 and per_day == 0 and not open and not ramp and cool_until <= now
local flags = (by_tokens and 1 or 0) + (concurrency > 0 and 2 or 0) + (open and 4 or 0)
  + (plain and 8 or 0) + (oversize and 16 or 0) + (given < want and 32 or 0)
local reply = string.format('%.0f|%.0f|%.0f|%.0f|%.0f|%d|%d|%d|', gen, now, cool_until,
  math.max(math.min(again, AGAIN), 1000), exhausted, flags, consecutive, version)
  .. table.concat(starts, ',')
local new = redis.call('HSET', PROCS, me,
  sequence .. string.format('|%.0f|%d|', now, mine) .. reply)
local fields, k = {'now', now}, 2
local function put(name, value, old)        -- what did not change is not written
  if value ~= old then fields[k + 1], fields[k + 2], k = name, value, k + 2 end
end
put('run_id', run_id, q[15])
put('gen', gen, num(q[16]))
put('cool_until', cool_until, num(q[17]))
put('consecutive', consecutive, num(q[18]))
put('success', success and '1' or '0', q[19])
put('fails', fails, num(q[20]))
put('probe', probe, q[21])
put('probe_at', probe_at, num(q[22]))
put('ramp_i', ramp_i, num(q[23]))
put('ramp_next', ramp_next, num(q[24]))
put('ceiling', ceiling, num(q[36]))
put('active', active, num(q[37]))
put('limited', limited, num(q[38]))
put('rate', rate, num(q[39]))
put('cycle_ok', cycle_ok, num(q[40]))
put('in_flight', in_flight, num(q[41]))
put('swept', swept, num(q[42]))
put('pace', p, num(q[43]))
put('busy_since', busy_since, num(q[44]))
local names = {'r', 't', 'i', 'o'}
for i = 1, #dims do
  local d = dims[i]
  put('tat_' .. names[d], tat[d], num(q[24 + d]))
  put('cr_' .. names[d], credit[d], num(q[28 + d]))
end
if per_day > 0 or day_until > 0 then
  put('day_used', day_used, num(q[33]))
  put('day_reset', day_reset, num(q[34]))
  put('day_until', day_until, num(q[35]))
end
redis.call('HSET', Q, unpack(fields))
if sweep or new == 1 or added == 1 then
  local ttl = 172800
  if day_until > now then ttl = ttl + math.ceil((day_until - now) / 1000000) end
  redis.call('EXPIRE', Q, ttl)
  redis.call('EXPIRE', PROCS, ttl)
  redis.call('EXPIRE', WAIT, ttl)
end
return reply
