-- 2 settle: count the calls of this process that have ended since its last request.
--
-- Their tokens are settled in step 4, refusals in step 3.
-- Leaves: successes (begun in the present epoch).

local SLICE = '<dI4'              -- in `history`: since when (microseconds), successes
local SLICE_BYTES = 12
local SLICES_KEPT = 12
local SLICE_US = 5000000          -- the shortest length of a slice
local SEARCH_GAIN = 0.25          -- starts per second that a success adds to the search
local SEARCH_PAUSE_US = 1000000   -- how long the search goes on after the rate held somebody up

local successes, late_successes = request_successes, request_late_successes
if request_known_epoch ~= live_epoch then   -- all of them began before the present epoch
  successes, late_successes = 0, successes + late_successes
end

-- The breaker's probe is leased to one process: it ends with its call, or with the process' last
-- permit.
if live_probing_process == process
    and (request_probe_ended == 1 or request_in_flight + request_reserved == 0) then
  live_probing_process = ''
end

-- Only a success of the present epoch shows that the provider takes calls again.
if successes > 0 then
  live_consecutive_cooldowns, live_failures_in_a_row, live_success_since_cut = 0, 0, 1
end

if successes + late_successes > 0 then
  live_successes_since_cut = live_successes_since_cut + successes + late_successes
  live_slice_successes = live_slice_successes + successes + late_successes
  if now_us - live_slice_since_us > SLICE_US then   -- the newest slice comes first
    local history = redis.call('HGET', QUOTA, 'history') or ''
    redis.call('HSET', QUOTA, 'history',
      struct.pack(SLICE, live_slice_since_us, live_slice_successes)
      .. string.sub(history, 1, (SLICES_KEPT - 1) * SLICE_BYTES))
    live_slice_since_us, live_slice_successes = now_us, 0
  end
  -- A quota whose rate nobody knows is searched for upwards, while the rate holds somebody up.
  if setup_adaptive == 1 and live_w_max == 0 and not rates_known
      and now_us - live_rate_limited_until_us < SEARCH_PAUSE_US then
    live_search_rate = min(
      live_search_rate + SEARCH_GAIN * (successes + late_successes), live_search_rate * 2)
  end
end

if setup_requests_per_day > 0 then
  if now_us >= live_day_resets_at_us then
    live_day_used, live_day_resets_at_us = 0, now_us - now_us % DAY_US + DAY_US
  end
  live_day_used = max(live_day_used - request_unused, 0)
end
