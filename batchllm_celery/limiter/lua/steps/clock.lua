-- 1 clock: the time, which never goes back, and whether Redis has forgotten something.
--
-- Leaves: now_us. If Redis has forgotten something: a new epoch, and a cooldown.

local SET_BACK_US = 5000000         -- how far the clock must be behind to count as set back
local LONGEST_SILENCE_US = 3000000  -- the most that one silence adds to the lease clock
local SHORTEST_RESTART_US = 20000   -- the shortest time in which Redis restarts

local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]

do
  local previous_us = live_now_us   -- the moment of the latest request, whoever made it
  local forgotten = false           -- Redis may have lost its last second, and with it reservations

  -- The clock had been ahead and was set back: every moment that was noted moves back with it, or
  -- the fleet would wait for the wrong time to come again.
  if previous_us - now_us > SET_BACK_US then
    local back_us = previous_us - now_us
    live_cooldown_until_us = max(live_cooldown_until_us - back_us, 0)
    live_probe_from_us = max(live_probe_from_us - back_us, 0)
    live_ramp_previous_us = max(live_ramp_previous_us - back_us, 0)
    live_rate_limited_until_us = max(live_rate_limited_until_us - back_us, 0)
    live_slice_since_us = max(live_slice_since_us - back_us, 0)
    live_busy_since_us = max(live_busy_since_us - back_us, 0)
    live_exhausted_until_us = max(live_exhausted_until_us - back_us, 0)
    previous_us, forgotten = now_us, true
    live_day_resets_at_us = min(live_day_resets_at_us, now_us - now_us % DAY_US + DAY_US)
    redis.call('HDEL', QUOTA, 'history')
    redis.call('DEL', WAITING)
  end
  now_us = max(now_us, previous_us)   -- a clock that is a little behind stands still

  -- Leases end on a clock of their own. It stands still while everybody is silent: then Redis
  -- was away, and those who had calls in flight have them still.
  if previous_us > 0 then
    live_lease_clock_us = live_lease_clock_us + min(now_us - previous_us, LONGEST_SILENCE_US)
  end

  if request_known_epoch > live_epoch then forgotten = true end   -- it knows more than Redis
  if live_epoch == 0 then live_epoch = now_us end

  -- A restart shows in the server's run id. INFO is dear, so LASTSAVE is asked first: it begins
  -- anew with the server too, but only in whole seconds.
  if now_us - previous_us > SHORTEST_RESTART_US then
    local last_save_s = redis.pcall('LASTSAVE')
    if last_save_s ~= live_last_save_s or now_us / 1000000 - last_save_s < 5 then
      local info = redis.pcall('INFO', 'server')
      local id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or live_run_id
      if live_run_id ~= '' and id ~= live_run_id then forgotten = true end
      live_last_save_s, live_run_id = type(last_save_s) == 'number' and last_save_s or 0, id
    end
  end

  -- Reservations that Redis does not know of may still be used: all are void, and nothing starts
  -- until the last of them is over.
  if forgotten then
    live_epoch, new_epoch = max(live_epoch + 1, request_known_epoch + 1, now_us), true
    live_cooldown_until_us = max(live_cooldown_until_us, now_us + setup_horizon_us + 1000000)
    tat_us = {0, 0, 0, 0}
  end

  -- CUBIC's time passes only while the rate holds somebody up (RFC 9438, 5.8: application-limited).
  local from_us = max(previous_us > 0 and previous_us or now_us, live_cooldown_until_us)
  local to_us = min(now_us, live_rate_limited_until_us)
  if to_us > from_us then live_curve_time_s = live_curve_time_s + (to_us - from_us) / 1000000 end
end

if live_slice_since_us == 0 then live_slice_since_us = now_us end
live_now_us = now_us
