-- 3 cooldown: the provider refused a call (429), or said that the day is over.
--
-- A refusal opens a new epoch: everybody stops until the cooldown's end, and all reservations are
-- void. (An overload opens none: step 6.)
-- Leaves: allowed_pace(), K_S (CUBIC's K).

-- CUBIC, RFC 9438, 4.1-4.2: t seconds after a cut the rate is w_max * (1 + C * (t - K)^3), so that
-- it is BETA * w_max at the cut and w_max again after K seconds. (C is relative to w_max, not
-- absolute.)
local BETA = 0.75
local C = 1e-5                    -- per cubic second
local K_S = ((1 - BETA) / C) ^ (1 / 3)

-- What is allowed now: a share of the rates, where they are known, else starts per second.
-- (A function, though it costs: this step needs it twice, the next one once.)
local function allowed_pace()
  if setup_adaptive == 0 then return rates_known and 1 or 0 end
  if live_w_max == 0 then return rates_known and 1 or live_search_rate end
  local pace = live_w_max * max(BETA, 1 + C * (live_curve_time_s - K_S) ^ 3)
  return rates_known and min(pace, 1) or pace
end

-- Only a call that began in the present epoch opens a cooldown: a burst of refusals is one event.
if request_refused_epoch >= live_epoch and not new_epoch then
  local WINDOW_US = 60000000      -- the window in which providers count, but for the day's
  local LONG_WAIT_US = 2000000    -- the shortest wait that says that a window is used up
  local FEW_CALLS = 5             -- the fewest successes by which a window is judged
  local FIRST_CUT = 0.6           -- the share of a searched rate that the provider seems to allow
  local DEFAULT_COOLDOWNS_S = '1,2,4,8,16,32,60'   -- of a quota that nobody configured

  -- How many calls succeeded in the last `span_us`, and how much of it is on record.
  local function succeeded_in(span_us)
    local history = redis.call('HGET', QUOTA, 'history') or ''
    local count, at, since_us = live_slice_successes, 1, live_slice_since_us
    while since_us > now_us - span_us and at < #history do
      local until_us, more = since_us, 0
      since_us, more, at = struct.unpack(SLICE, history, at)
      local share = (until_us - now_us + span_us) / max(until_us - since_us, 1)
      count = count + more * min(share, 1)
    end
    return count, min(now_us - since_us, span_us)
  end

  live_consecutive_cooldowns = live_consecutive_cooldowns + 1
  live_failures_in_a_row = live_failures_in_a_row + 1

  -- How long: what the provider asks for. The quota's own list counts where it asks for nothing,
  -- where the policy says so, or, two places behind, once it has asked for too little twice.
  local cooldown_us, place = max(request_retry_after_us, 0), 0
  if setup_adaptive == 0 or request_retry_after_us < 0 then
    place = live_consecutive_cooldowns
  elseif live_consecutive_cooldowns > 2 then
    place = live_consecutive_cooldowns - 2
  end
  if place > 0 then
    local listed, i, listed_us = redis.call('HGET', QUOTA, 'cooldowns') or DEFAULT_COOLDOWNS_S, 0, 0
    for seconds in string.gmatch(listed, '[^,]+') do    -- the last one repeats
      i = i + 1
      if i <= place then listed_us = tonumber(seconds) * 1000000 end
    end
    cooldown_us = max(cooldown_us, listed_us)
  end
  cooldown_us = min(cooldown_us, setup_max_cooldown_us)

  -- Cut the rate, once, and only if a call has succeeded since the last cut: refusals in a row say
  -- nothing new.
  if setup_adaptive == 1 and live_success_since_cut == 1 then
    local rate = allowed_pace()
    if not rates_known and live_w_max == 0 and live_search_rate >= FULL_SPEED then
      -- The first refusal at full speed: what came through so far is the rate to begin with.
      local count, recorded_us = succeeded_in(WINDOW_US)
      live_search_rate = max(count * 1000000 / max(recorded_us, 1000000), START_RATE)
      rate = live_search_rate
    end
    local few = live_successes_since_cut < FEW_CALLS
    live_success_since_cut = 0
    if not rates_known and live_w_max == 0 and few then
      live_search_rate = max(live_search_rate / 2, 1)   -- the search goes on, from lower down
    else
      if not rates_known and live_w_max == 0 then rate = rate * FIRST_CUT end
      -- A long wait: the provider's window is used up. What it had let in, over the time until it
      -- opens again, is its rate.
      if not rates_known and cooldown_us >= LONG_WAIT_US and not few then
        local average
        if cooldown_us >= WINDOW_US then
          average = live_successes_since_cut / (live_curve_time_s + cooldown_us / 1000000)
        else
          local span_us = WINDOW_US - cooldown_us       -- how much of the window has passed
          local count, recorded_us = succeeded_in(span_us)
          -- Of the wait, as much counts as of the span is on record. (At the first cut all of it
          -- counts: the rate was growing, and all that was ever sent is on record.)
          local wait_us = cooldown_us
          if live_w_max > 0 then wait_us = wait_us * recorded_us / span_us end
          average = count * 1000000 / (recorded_us + wait_us)
        end
        if rate > 2 * average then rate = average end
      end
      live_w_max, live_curve_time_s, live_successes_since_cut = max(rate, 0.01), 0, 0
    end
  end

  -- A new epoch voids all reservations. What they had paid is returned; no burst follows, and the
  -- first start comes one spacing after the end: the provider counts up to the request that it
  -- refused.
  live_epoch, new_epoch = max(live_epoch + 1, now_us), true
  live_cooldown_until_us = max(live_cooldown_until_us, now_us + cooldown_us)
  local first_us = live_cooldown_until_us
  if setup_adaptive == 1 then
    local per_second = allowed_pace() * (rates_known and rates[1] or 1)
    if per_second > 0 then first_us = first_us + min(1000000 / per_second, 1000000) end
  end
  for d = 1, 4 do
    if tat_us[d] > 0 then tat_us[d] = max(first_us, tat_us[d] - lookahead_us) end
  end
  live_ramp_position, live_ramp_previous_us = 0, live_cooldown_until_us
  live_rate_limited_until_us = live_cooldown_until_us
end

-- The day is over. A short wait (or none) is no day's end: try again at midnight UTC, or in an
-- hour.
if request_day_exhausted_us >= 0 then
  local wait_us = request_day_exhausted_us
  if wait_us < 600000000 then wait_us = min(DAY_US - now_us % DAY_US, 3600000000) end
  live_exhausted_until_us = max(live_exhausted_until_us, now_us + wait_us)
end
