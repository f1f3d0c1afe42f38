-- 7 grant: choose start times, first for the waiters, then for callers to come (prefetched).
--
-- Leaves: starts (microseconds after now), granted (their number), served (waiters that got one),
-- permits (of this process, with the new ones), ask_again_us, exhausted_until_us, oversize,
-- breaker_open, spacings_us, has_its_share, joins_waiting.

local PREFETCH_US = 50000         -- how far ahead starts for callers to come are reserved at most
local FAIRNESS_WINDOW_US = 150000 -- how long the next process in turn is waited for at most
local OUT_OF_TURN_US = 50000      -- the shortest time between two requests of a process out of turn
local LONGEST_WAIT_US = 900000    -- the longest time after which a process with waiters asks again
local SHORT_WINDOW_US = 800000    -- providers' shortest window: burst and a request must fit in
local OVERSIZE_US = 60000000      -- the cost from which on a request is reported: a minute's worth
local LULL_US = 60000000          -- how long without load until CUBIC begins at its lowest again

-- A moment without debts: the fleet asks for less than the rate. What CUBIC has found beyond
-- `w_max` does not hold after it.
do
  local without_debt = true
  for i = 1, #limited do
    if tat_us[limited[i]] > now_us then without_debt = false end
  end
  if without_debt or live_cooldown_until_us > now_us then
    live_busy_since_us = max(now_us, live_cooldown_until_us)
  end
  if without_debt and live_curve_time_s > K_S then live_curve_time_s = K_S end
end

-- How many starts does everything but the rate leave? And what holds the waiters up?
local room = request_wanted + request_prefetch
local held_up_by                  -- 'rate', 'slots', 'day' or 'cooldown' (or the breaker)
local ask_again_us, exhausted_until_us = LONGEST_WAIT_US, 0
local has_its_share = false       -- this process has its share of the slots: others come first

if setup_requests_per_day > 0 and setup_requests_per_day - live_day_used < room then
  room, held_up_by = max(setup_requests_per_day - live_day_used, 0), 'day'
  if room == 0 and request_wanted > 0 then exhausted_until_us = live_day_resets_at_us end
end
if live_exhausted_until_us > now_us then
  room, held_up_by, exhausted_until_us = 0, 'day', live_exhausted_until_us
end
if #estimates == 0 and tokens_limited
    and (request_wanted > 0 or request_known_epoch ~= live_epoch) then
  room, held_up_by, ask_again_us = 0, 'cooldown', 0   -- it does not know that tokens are limited
end

local permits = request_in_flight + request_reserved
if slots_limited then
  local free = most_in_flight - live_in_flight - permits
  if waiting > 1 then             -- a slot is left for each process that waits for longer
    local ahead = is_queued and redis.call('ZRANK', WAITING, process) or waiting - 1
    local share = max(ceil(most_in_flight / waiting), 1) - permits
    has_its_share = share <= 0
    free = min(free - min(ahead, free), share)
  end
  if free < room then room, held_up_by = max(free, 0), 'slots' end
end

-- Nothing starts before `earliest_us`. Nobody overtakes a slow start either.
local earliest_us = max(now_us, live_cooldown_until_us, live_ramp_previous_us, paused_until_us)
local breaker_open = live_failures_in_a_row >= BREAKER_FAILURES
if breaker_open then
  earliest_us = max(earliest_us, live_probe_from_us)
  if live_probing_process ~= '' or earliest_us > now_us + lookahead_us then
    room, held_up_by = 0, 'cooldown'
  else
    room = min(room, 1)
  end
end

local spacings_us                 -- between the starts of a slow start, if one is under way
if live_ramp_position >= 0 and setup_adaptive == 0 and setup_ramp_length > 0
    and (live_ramp_position < setup_ramp_length or setup_ramp_repeats ~= 0) then
  spacings_us = {}
  for seconds in string.gmatch(redis.call('HGET', QUOTA, 'ramp') or '', '[^,]+') do
    spacings_us[#spacings_us + 1] = tonumber(seconds) * 1000000
  end
end

-- Start, then pay: a start is when all that was started before is paid for, whatever it costs
-- itself. (The one hot loop: comparisons take the place of calls of min and max.)
local starts, granted, last_us, spent_us, oversize = {}, 0, now_us, 0, false
do
  local burst_us, dimensions = setup_burst_us, #limited
  local longest_burst_us, costs_us = max(burst_us, SHORT_WINDOW_US), {}
  local wanted, reserved = request_wanted, request_reserved
  -- Processes take turns with the last share of the lookahead. Without it, the process nearest to
  -- Redis would be the first whenever there is room. So much is kept that the next one may be some
  -- way off.
  local share_us, horizon_us = lookahead_us / waiting, now_us + lookahead_us
  local frontier_us = horizon_us
  if waiting > 1 and dimensions > 0
      and not (is_queued and redis.call('ZRANK', WAITING, process) == 0) then
    frontier_us = horizon_us - max(share_us, min(FAIRNESS_WINDOW_US, lookahead_us / 2))
  end
  local tokens, input, output = nil, request_prefetch_input, request_prefetch_output
  if #estimates > 0 then
    tokens = {struct.unpack('<' .. string.rep('I4', #estimates / 4), estimates)}
  end
  while granted < room do
    if tokens then
      if granted < wanted then
        input, output = tokens[2 * granted + 1], tokens[2 * granted + 2]
      else
        input, output = request_prefetch_input, request_prefetch_output
      end
    end

    local start_us, cost_us, is_oversize = earliest_us, 0, false
    for i = 1, dimensions do
      local d = limited[i]
      local tat, cost = tat_us[d], unit_us[d]
      if tat > start_us then start_us = tat end
      if d == 2 then cost = cost * (input + output) elseif d == 3 then cost = cost * input
      elseif d == 4 then cost = cost * output end
      costs_us[i] = cost
      if cost > cost_us then cost_us = cost end
      if d > 1 and cost > OVERSIZE_US then is_oversize = true end
    end
    if spacings_us then
      if live_ramp_position >= setup_ramp_length and setup_ramp_repeats == 0 then
        spacings_us, earliest_us = nil, max(earliest_us, live_ramp_previous_us)   -- it is over
        start_us = max(start_us, earliest_us)
      elseif live_ramp_position > 0 then
        local spacing_us = spacings_us[min(live_ramp_position + 1, #spacings_us)]
        start_us = max(start_us, live_ramp_previous_us + spacing_us)
      end
    end

    -- Enough? Beyond the frontier it is another's turn, and nobody takes more than its share.
    if granted >= wanted and start_us > now_us + PREFETCH_US then break end
    if start_us > frontier_us then
      held_up_by = start_us > earliest_us and 'rate' or 'cooldown'
      ask_again_us = start_us - frontier_us
      if held_up_by == 'rate' and frontier_us < horizon_us then
        ask_again_us = max(ask_again_us, OUT_OF_TURN_US)
      end
      break
    end
    if waiting > 1 and granted + reserved > 0
        and (granted + reserved) * (spent_us + cost_us) / (granted + 1) >= share_us then
      held_up_by, ask_again_us = 'rate', share_us / 2
      break
    end

    -- Pay. `tat_us` may lie so far before the start as the burst allows; of a costly request less,
    -- for burst and request together must fit into a provider's bucket of a second.
    if is_oversize then oversize = true end
    spent_us = spent_us + cost_us
    for i = 1, dimensions do
      local d, cost = limited[i], costs_us[i]
      local tat, ahead_us = tat_us[d], longest_burst_us - cost
      if ahead_us > burst_us then ahead_us = burst_us elseif ahead_us < 0 then ahead_us = 0 end
      local earliest = start_us - ahead_us
      if tat < earliest then tat = earliest end
      tat_us[d] = tat + cost
    end
    if spacings_us then
      live_ramp_position, live_ramp_previous_us = live_ramp_position + 1, start_us
    end
    granted = granted + 1
    starts[granted] = start_us - now_us + 1   -- in whole microseconds, and never early
    if granted <= wanted then last_us = start_us end
  end
end
if breaker_open and granted > 0 then live_probing_process = process end
if setup_requests_per_day > 0 then live_day_used = live_day_used + granted end
permits = permits + granted
live_in_flight = live_in_flight + permits
local served = min(granted, request_wanted)

-- A process whose waiters are all served leaves WAITING; one that got something goes to its end.
local joins_waiting = served < request_wanted and not is_queued
if served == request_wanted then
  if is_queued then redis.call('ZREM', WAITING, process) end
elseif joins_waiting or has_its_share or served > 0 then
  redis.call('ZADD', WAITING, now_us, process)
end

-- The rate holds the fleet up if starts have lain ahead without a gap for a while: two requests
-- that came together are no sign of it. Until then CUBIC's time passes (step 1), and a search goes
-- on (step 2).
if served > 0 and last_us <= now_us + 1000 and held_up_by ~= 'rate' then
  live_busy_since_us = now_us
end
if request_wanted > 0
    and now_us - live_busy_since_us >= max(250000, 4 * spent_us / max(granted, 1)) then
  local held_until_us = live_rate_limited_until_us
  if not rates_known and held_until_us > 0 and now_us > held_until_us then
    local left = max(1 - (now_us - held_until_us) / LULL_US, 0)
    live_curve_time_s = min(live_curve_time_s, K_S * left)
  end
  for i = 1, #limited do
    live_rate_limited_until_us = max(live_rate_limited_until_us, tat_us[limited[i]])
  end
end

if held_up_by == 'cooldown' and earliest_us > now_us + lookahead_us then
  ask_again_us = earliest_us - lookahead_us - now_us
end
