-- 5 processes: end the leases of those that are silent, and see who else waits.
--
-- Times are compared on the lease clock (step 1), which stands still while everybody is silent.
-- Leaves: leases_checked, waiting (processes with waiters, this one included), is_queued (this one
-- stood in WAITING before).

local CALLS_LEASE_US = 10000000   -- how long the calls in flight of a silent process count
local WAITING_LEASE_US = 3000000  -- how long a silent process counts as waiting
local REPLY_KEPT_US = 600000000   -- how long a silent process may ask for its last reply again

local leases_checked = live_lease_clock_us - live_leases_checked_us >= 1000000   -- once a second
live_in_flight = live_in_flight - permits_before
if leases_checked then
  live_leases_checked_us, live_in_flight = live_lease_clock_us, 0
  local all = redis.call('HGETALL', PROCESSES)
  for i = 1, #all, 2 do
    local other, stored = all[i], all[i + 1]
    if other ~= process then
      local sequence, seen_us, permits, reply_at = struct.unpack(PROCESS, stored)
      local silent_us = live_lease_clock_us - seen_us
      if silent_us > CALLS_LEASE_US then
        if silent_us > REPLY_KEPT_US then
          redis.call('HDEL', PROCESSES, other)
        elseif permits > 0 then
          redis.call('HSET', PROCESSES, other,
            struct.pack(PROCESS, sequence, seen_us, 0) .. string.sub(stored, reply_at))
        end
        if live_probing_process == other then live_probing_process = '' end
      else
        live_in_flight = live_in_flight + permits
      end
      if silent_us > WAITING_LEASE_US then redis.call('ZREM', WAITING, other) end
    end
  end
end
live_in_flight = max(live_in_flight, 0)       -- calls in flight and reservations of the others

local waiting, is_queued = 1, false
if request_wanted > 0 then
  waiting = redis.call('ZCARD', WAITING)      -- mostly nobody waits, and one call is enough
  is_queued = waiting > 0 and redis.call('ZSCORE', WAITING, process) and true
  if not is_queued then waiting = waiting + 1 end
else
  is_queued = known_process                   -- perhaps; who wants nothing is taken out in step 7
end
