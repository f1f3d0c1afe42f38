-- acquire.lua: settle what one process has finished, then reserve start times for its waiters.
--
-- One run serves one request of one process to one quota. All times come from Redis' clock, in
-- microseconds (`_us`) since 1970. Durations end in `_us` or `_s`. Rates are per second.
-- The steps, in their order:
--
--   0 headers    what does the provider say of its limits?
--   1 clock      what time is it, and has Redis forgotten something?
--   2 settle     count the calls that have ended since the process' last request
--   3 cooldown   the provider refused: void all reservations, stop everybody, cut the rate
--   4 refill     what a request and a token cost in time; debts and refunds
--   5 processes  end the leases of dead processes; who else is waiting?
--   6 congestion how many calls does the provider have room for?
--   7 grant      choose the start times
--
-- The rate is limited by GCRA, the generic cell rate algorithm (ITU-T I.371), in each dimension by
-- itself. Its state is one moment, the theoretical arrival time (`tat_us`): when everything that
-- was started is paid for. After a refusal the rate follows CUBIC (RFC 9438): `w_max` is the rate
-- at which the provider refused, `BETA` what is left after a cut, `C` how fast the rate comes back.
--
-- When may a call start?
--   At the latest of: now, the end of the cooldown, the previous start of a slow start plus its
--   spacing, the breaker's next probe, and `tat_us` of every limited dimension. It starts first and
--   pays then (`tat_us` moves on by its cost), so a call of any size can start. Starts are reserved
--   LOOKAHEAD_US ahead at most, and only while the day and the slots leave room.
-- What does a refund do?
--   It moves `tat_us` back, so that the next start comes sooner, but never to more than a burst
--   before now. A debt (a call used more than was reserved) moves it on. Tokens that were forfeited
--   (reserved while nobody could use them) come back only far beyond now: step 4.
-- Why is a reservation void?
--   Its epoch is over: a cooldown, changed limits, or a Redis that lost data began a new one.
--   Or its process used it too late, and releases it.
-- What does a second process see?
--   The same `live` state, so its starts come after those of the first. Processes with waiters
--   stand in WAITING, in the order of their turns. Each gets its share of the lookahead and of the
--   slots, and goes to the end once it was served.
--
-- KEYS     1 QUOTA      hash: `setup`, `live`, `congestion`, `headers` (records), `config`, `cooldowns`, `ramp`,
--                        `history`
--          2 PROCESSES  hash: process -> PROCESS (below), then its last reply
--          3 WAITING    zset: process with waiters -> since when (microseconds)
--          4 CHANNEL    channel: "epoch:N", a new epoch; "slot:PROCESS", that process should ask
-- ARGV     1 the protocol's number    2 process    3 request (a record)
--          4 input and output tokens of each waiter, in the order of their turns, as uint32;
--            empty while the process does not know that tokens are limited
--          5 ended calls by the version of the learnt limit that they began under, oldest first:
--            version, successes, overloads, and of the successes the sums of seconds, tokens and
--            seconds^2 / tokens, as doubles; empty while there is no such limit and no overload
--          6 report (a record: what the newest headers said of the provider's limits), or empty
-- returns  reply (a record), then each start in microseconds after `reply.now_us`, as uint32
--
-- The fields of records stand once, with units: `request`, `report` and `reply` in
-- limiter/protocol.py, those of QUOTA in limiter/quota_state.py. A line `--#read RECORD ...`
-- makes each field a local, RECORD_FIELD; `--#pack RECORD` makes RECORD_packed of them. (With tables
-- the script took five microseconds more.) limiter/scripts.py puts these lines in place, and before
-- this text `pack_reply` and the constants that Python knows too.
--
-- A request that is repeated (same process and sequence) gets the same reply: nothing is done twice.
--
-- The steps are included as text, and share their locals. (Making a Lua function for each would
-- cost a microsecond or two in every run, which takes some forty.) A step names what it leaves for
-- later ones.

if tonumber(ARGV[1]) ~= PROTOCOL then
  return {err = 'ERR the limiter speaks protocol ' .. PROTOCOL .. ', not ' .. ARGV[1]}
end
--#include constants.lua
local QUOTA, PROCESSES, WAITING, CHANNEL = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local process, estimates = ARGV[2], ARGV[4]
--#read request ARGV[3]
local max, min, ceil = math.max, math.min, math.ceil

local PROCESS = '<ddI4'           -- sequence of its last request, lease clock then, permits held
local DAY_US = 86400000000        -- the length of a day

local known_process = redis.call('HGET', PROCESSES, process)
local permits_before = 0          -- permits that it held at its last request
if known_process then
  local sequence, _, permits, reply_at = struct.unpack(PROCESS, known_process)
  if sequence == request_sequence then return string.sub(known_process, reply_at) end
  permits_before = permits
end

local stored = redis.call('HMGET', QUOTA, 'setup', 'live', 'congestion', 'headers')
--#read setup stored[1]
--#read live stored[2]
if not stored[2] and (setup_full_speed == 1 or request_full_speed == 1) then
  live_search_rate = FULL_SPEED
end

-- Dimensions, wherever they are numbered: 1 requests, 2 tokens, 3 input tokens, 4 output tokens.
local rates = {
  setup_requests_per_second, setup_tokens_per_second,
  setup_input_tokens_per_second, setup_output_tokens_per_second,
}
local tat_us = {live_tat_requests_us, live_tat_tokens_us, live_tat_input_us, live_tat_output_us}
--#include steps/headers.lua
local rates_known = rates[1] + rates[2] + rates[3] + rates[4] > 0
local tokens_limited = rates[2] + rates[3] + rates[4] > 0
local lookahead_us = min(setup_horizon_us, LOOKAHEAD_US)
local was_failing = live_failures_in_a_row > 0
local new_epoch = false           -- this request has begun one

--#include steps/clock.lua
--#include steps/settle.lua
--#include steps/cooldown.lua
--#include steps/refill.lua
--#include steps/processes.lua
--#include steps/congestion.lua
--#include steps/grant.lua

-- Notify. A slot that this process frees, or has no use for, goes to the first that waits.
if new_epoch then redis.call('PUBLISH', CHANNEL, string.format('epoch:%.0f', live_epoch)) end
local frees_slot = slots_limited and live_in_flight < most_in_flight
  and (permits < permits_before + granted or has_its_share and request_wanted > 0)
local frees_probe = breaker_open and live_probing_process == ''
local breaker_closed = was_failing and live_failures_in_a_row == 0
if frees_slot or frees_probe or breaker_closed then
  local first = redis.call('ZRANGE', WAITING, 0, 0)[1]
  if first and first ~= process then redis.call('PUBLISH', CHANNEL, 'slot:' .. first) end
end

-- Reply and remember.
local reply = pack_reply({
  epoch = live_epoch,
  now_us = now_us,
  cooldown_until_us = live_cooldown_until_us,
  ask_again_us = max(min(ask_again_us, LONGEST_WAIT_US), 1000),
  exhausted_until_us = exhausted_until_us,
  consecutive_cooldowns = live_consecutive_cooldowns,
  tokens_limited = tokens_limited and 1 or 0,
  slots_limited = slots_limited and 1 or 0,
  probing = breaker_open and 1 or 0,
  may_prefetch = (slots_limited or setup_requests_per_day > 0 or breaker_open or spacings_us
    or live_cooldown_until_us > now_us) and 0 or 1,
  oversize = oversize and 1 or 0,
  held_up = served < request_wanted and 1 or 0,
  limit_version = limit_version,
  beside_successes = beside_successes,
}) .. struct.pack('<' .. string.rep('I4', granted), unpack(starts))

local is_new = redis.call('HSET', PROCESSES, process,
  struct.pack(PROCESS, request_sequence, live_lease_clock_us, permits) .. reply)
live_tat_requests_us, live_tat_tokens_us = tat_us[1], tat_us[2]
live_tat_input_us, live_tat_output_us = tat_us[3], tat_us[4]
--#pack live
if new_congestion then
  redis.call('HSET', QUOTA, 'live', live_packed, 'congestion', new_congestion)
else
  redis.call('HSET', QUOTA, 'live', live_packed)
end
if new_headers then redis.call('HSET', QUOTA, 'headers', new_headers) end
if leases_checked or is_new == 1 or joins_waiting then
  local kept_s = KEYS_KEPT_S + max(ceil((live_exhausted_until_us - now_us) / 1000000), 0)
  redis.call('EXPIRE', QUOTA, kept_s)
  redis.call('EXPIRE', PROCESSES, kept_s)
  redis.call('EXPIRE', WAITING, kept_s)
end
return reply
