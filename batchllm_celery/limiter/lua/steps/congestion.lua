-- 6 congestion: how many calls in flight the provider seems to have room for.
--
-- A server of one's own has no quota: beyond its room it refuses (503, 529), or grows slow. So the
-- calls in flight are limited, for the whole fleet, from the first overload on, or from the start
-- with `adaptive_concurrency`. A quota that never saw an overload pays nothing for it.
--
-- The limit is moved in trials. A call carries the `version` of the limit that it began under, and
-- counts for that one only: what began before a cut says nothing of what the cut has done.
--   After an overload the limit goes once to what is in flight beside it, but at most to BETA of
--   itself; the refused limit is a ceiling that a binary search approaches from below. At rest
--   there, it tries a little more from time to time; what is beyond the ceiling by half is free.
--   With `adaptive_concurrency` a limit that was raised stays only if the throughput grew by it,
--   and lower ones are tried, too. Throughput is calls in flight over seconds per token (Little's
--   law). Both sides of a comparison are windows that follow each other: batching servers are
--   twice as slow per token at their best limit, and every minimum that was remembered got stuck.
--
-- Leaves: most_in_flight (calls in flight and reservations of the fleet; huge: no limit),
-- slots_limited, paused_until_us, limit_version (-1: there is no such limit), beside_successes,
-- new_congestion (nil: nothing is known).

local huge = math.huge
local most_in_flight = setup_max_concurrency > 0 and setup_max_concurrency or huge
local new_congestion, limit_version, beside_successes, paused_until_us = nil, -1, 0, 0

if stored[3] or request_overloads > 0 or setup_adaptive_concurrency == 1 then
  local BETA = 0.7                -- the least that one cut leaves of the limit
  local GAIN = 0.25               -- throughput must grow by (new limit / old limit) ^ GAIN
  local STEP = 1.25               -- factor of a trial; it grows with each that stays, to 2
  local SURE = 2                  -- standard errors that make a difference one
  local REST = 2                  -- windows between trials; each that fails doubles them, up to:
  local UP_REST, DOWN_REST = setup_adaptive_concurrency == 1 and 4 or 6, 16
  local HOLD = 8                  -- successes after a cut until a refusal is news again
  local CREDIT = 0.2              -- a success excuses so much of a refusal: a few per cent whatever
  local LEAST_CREDIT, CREDIT_SHARE = 2, 0.06   -- the load are no reason to cut; saved at most
  local RECENT_US = 10000000      -- how long a success shows that the provider answers, at least
  local LONGEST_PAUSE_US = 2000000     -- between calls that are refused again and again

  --#read congestion stored[3]
  local n = live_in_flight + request_in_flight + request_reserved   -- in flight beside what ended
  local most_credit = max(LEAST_CREDIT, CREDIT_SHARE * min(congestion_limit, n + request_overloads))
  if congestion_version == 0 then           -- the first version is one that no call began under
    congestion_version = 1
    if setup_adaptive_concurrency ~= 1 then
      congestion_limit, congestion_mode = huge, 0
      most_credit = max(LEAST_CREDIT, CREDIT_SHARE * (n + request_overloads))
      congestion_credit = most_credit
      if live_slice_successes > 0 then congestion_success_us = now_us end
    end
  end

  local function move(limit, mode)
    congestion_limit, congestion_mode = max(limit, 1), mode
    congestion_version = congestion_version + 1
    congestion_calls, congestion_seconds, congestion_tokens = 0, 0, 0
    congestion_flight, congestion_squares, congestion_peak = 0, 0, 0
  end

  local function rest(limit)
    congestion_left_up, congestion_left_down = congestion_rest_up, congestion_rest_down
    congestion_step, congestion_extra, congestion_base_rate = STEP, 0, 0
    move(limit, 0)
  end

  local function clear()
    move(congestion_limit, congestion_mode)
    congestion_version = congestion_version - 1
  end

  local function up()             -- to where it was refused and beyond in steps that double
    if congestion_ceiling < huge then
      congestion_extra = congestion_extra > 0 and 2 * congestion_extra
        or max(1, congestion_limit / 50)
      if congestion_extra > congestion_limit / 2 then
        congestion_ceiling, congestion_extra, congestion_step = huge, 0, 2
      end
    end
    if congestion_ceiling < huge then
      move(congestion_limit + congestion_extra, 1)
    else
      local limit = max(congestion_limit * congestion_step, congestion_limit + 1)
      congestion_step = min(congestion_step * STEP, 2)
      move(limit, 1)
    end
  end

  local function down()
    if congestion_limit <= 1 then return rest(1) end
    local limit = min(congestion_limit / congestion_step, congestion_limit - 1)
    congestion_step = min(congestion_step * STEP, 2)
    move(limit, -1)
  end

  -- A window is full: was the trial worth it, or is it time for another one?
  local function judge()
    local mean = congestion_flight / congestion_calls
    if congestion_peak < 0.8 * math.floor(congestion_limit) then return clear() end   -- not used
    if setup_adaptive_concurrency ~= 1 then   -- only refusals tell
      congestion_left_up = congestion_left_up - 1
      if congestion_mode == 1 then congestion_rest_up = REST end
      if congestion_mode == 1 or congestion_left_up <= 0 then return up() end
      return clear()
    end
    local per_token = congestion_seconds / congestion_tokens
    local rate = mean / per_token
    -- The variance of log(rate), by the spread of the calls' seconds per token.
    local spread = congestion_squares / congestion_tokens / per_token ^ 2 - 1
    local variance = max(spread, 0) / congestion_calls
    local function compare_with_this()
      congestion_base_limit, congestion_base_flight = congestion_limit, mean
      congestion_base_rate, congestion_base_variance = rate, variance
    end
    local grown, wider = 0, 0
    if congestion_base_rate > 0 then
      grown = math.log(rate / congestion_base_rate)
      wider = math.log(mean / congestion_base_flight)
    end
    local error, gain = SURE * math.sqrt(variance + congestion_base_variance), grown - GAIN * wider
    if congestion_mode == 0 then
      compare_with_this()
      congestion_left_up, congestion_left_down = congestion_left_up - 1, congestion_left_down - 1
      if congestion_left_down <= 0 and congestion_limit > 1 then return down() end
      if congestion_left_up <= 0 then return up() end
      return clear()
    elseif congestion_mode == 1 then
      if wider > 0.15 and gain < (wider < 1 and -error or 0) then
        congestion_rest_up = min(2 * congestion_rest_up, UP_REST)
        return rest(congestion_base_limit)
      end
      if congestion_base_rate == 0 or wider > 0.15 and gain > 0 then
        compare_with_this()
        congestion_rest_up, congestion_rest_down = REST, REST
      end
      return up()                 -- in doubt further up: the comparison stays the same
    elseif gain < error then      -- in doubt back: less throughput is worse than more latency
      congestion_rest_down = min(2 * congestion_rest_down, DOWN_REST)
      return rest(congestion_base_limit)
    end
    compare_with_this()
    congestion_ceiling, congestion_rest_up, congestion_rest_down = huge, REST, REST
    down()
  end

  local function succeeded(version, calls, seconds, tokens, squares)
    if version >= congestion_cut_version then
      congestion_since_cut = congestion_since_cut + calls
      congestion_credit = min(congestion_credit + CREDIT * calls, most_credit)
      congestion_pause_us = 0
    end
    congestion_success_us = now_us
    if seconds > 0 then
      local weight = min(0.05 * calls, 1)
      congestion_latency_s = congestion_latency_s
        + weight * (seconds / calls - congestion_latency_s)
    end
    local flight = n + (calls + 1) / 2      -- in the mean, as they ended one by one
    if congestion_mode == 2 then
      if congestion_since_cut > HOLD and n + calls >= 0.8 * math.floor(congestion_limit) then
        for _ = 1, calls do
          local left = congestion_ceiling - congestion_limit
          congestion_limit = congestion_limit + max(min(left / (2 * congestion_limit), 1), 0)
        end
        if congestion_ceiling - congestion_limit <= max(1, congestion_limit / 50) then
          rest(congestion_limit)
        end
      end
    elseif version == congestion_version then
      congestion_calls = congestion_calls + calls
      congestion_seconds, congestion_tokens = congestion_seconds + seconds, congestion_tokens + tokens
      congestion_squares = congestion_squares + squares
      congestion_flight = congestion_flight + flight * calls
      congestion_peak = max(congestion_peak, n + calls)
      local quick = congestion_mode == 1 and (congestion_step >= 2 or congestion_extra > 0)
      local window = setup_adaptive_concurrency == 1 and min(8 + 8 * congestion_limit, 40) or 10
      window = quick and max(congestion_limit, 8) or max(2 * congestion_limit, window)
      if congestion_calls >= window then judge() end
    end
  end

  local recent_us = max(RECENT_US, 4000000 * congestion_latency_s)   -- twice what nine in ten take
  local function refused(version)
    congestion_overload_us = now_us
    if version < congestion_cut_version then
      -- The rest of the burst that led to the cut: the room is what is left when all are back.
      if congestion_since_cut == 0 then
        congestion_limit = max(congestion_floor, min(congestion_limit, n))
      end
      return true
    end
    congestion_credit = congestion_credit - 1
    if congestion_credit >= 0 then return false end
    if congestion_limit == huge then congestion_limit = n + request_overloads end
    local limit
    if congestion_since_cut >= HOLD then
      congestion_ceiling = math.floor(congestion_limit)
      congestion_floor = max(1, BETA * congestion_limit)
      limit = max(min(congestion_limit - 1, n), congestion_floor)
      if congestion_mode == 1 then                     -- a trial: back to where it began
        congestion_rest_up = min(2 * congestion_rest_up, UP_REST)
        if congestion_base_rate > 0 and congestion_base_limit >= congestion_floor then
          limit = min(limit, congestion_base_limit)
        end
      end
    else                          -- again, and at once: what is in flight says nothing
      if congestion_ceiling == huge then congestion_ceiling = congestion_limit end
      congestion_floor = max(1, BETA * min(congestion_limit, max(n, 1)))
      limit = congestion_floor
      -- A place that was refused is not used again at once, or a full server that says no in
      -- milliseconds is asked hundreds of times a second.
      congestion_pause_us = min(max(2 * congestion_pause_us, 10000), LONGEST_PAUSE_US)
      congestion_paused_until_us = now_us + congestion_pause_us
    end
    congestion_since_cut, congestion_extra, congestion_credit = 0, 0, LEAST_CREDIT
    if congestion_ceiling - limit <= max(1, limit / 50) then
      local left_down = congestion_left_down
      rest(limit)
      congestion_left_down = min(left_down, congestion_left_down)
    else
      move(limit, 2)
    end
    congestion_cut_version = congestion_version
    return false
  end

  local report, at = ARGV[5], 1
  while at < #report do           -- by version, oldest first
    local version, successes, overloads, seconds, tokens, squares
    version, successes, overloads, seconds, tokens, squares, at =
      struct.unpack('<dddddd', report, at)
    if successes > 0 then succeeded(version, successes, seconds, tokens, squares) end
    for _ = 1, overloads do
      if refused(version) then break end
    end
  end
  beside_successes = now_us - congestion_success_us <= recent_us and 1 or 0

  -- Overloads without a recent success open the breaker: one probe at a time, first after 1 s, then 2, 4
  -- ... 30 s.
  if beside_successes == 0 then
    live_failures_in_a_row = live_failures_in_a_row + request_overloads
  end
  if request_overloads > 0 and live_failures_in_a_row >= BREAKER_FAILURES then
    local wait_us = min(1000000 * 2 ^ (live_failures_in_a_row - BREAKER_FAILURES), 30000000)
    live_probe_from_us = max(live_probe_from_us, now_us + wait_us)
  end

  if congestion_limit == huge and now_us - congestion_overload_us > 600000000
      and setup_adaptive_concurrency ~= 1 then
    redis.call('HDEL', QUOTA, 'congestion')   -- a few overloads, long ago
  else
    --#pack congestion
    new_congestion, limit_version = congestion_packed, congestion_version
    paused_until_us = congestion_paused_until_us
    -- The breaker's probe is one more call: it would wait for long ones to end.
    if live_failures_in_a_row < BREAKER_FAILURES then
      most_in_flight = min(most_in_flight, max(math.floor(congestion_limit), 1))
    end
  end
end
local slots_limited = most_in_flight < huge
