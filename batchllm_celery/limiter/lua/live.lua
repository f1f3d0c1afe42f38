-- live.lua: how a quota's moving state is stored; put before each script of the limiter.
--
-- Every permit costs one reading and one writing of it, so it is a struct: a msgpack map took three
-- times as long.

-- (What comes later stands at the end: an older version then reads what it knows.)
local LIVE = '<' .. string.rep('d', 29) .. 'ss'

local function unpack_live(packed)
  local now, gen, cool_until, consecutive, success, fails, probe_at, ramp_i, ramp_next, day_used,
    day_reset, day_until, ceiling, active, limited, rate, cycle_ok, ok, ok_since, pace, in_flight,
    swept, busy_since, saved, tat1, tat2, tat3, tat4,
    heard, probe, run_id = struct.unpack(LIVE, packed)
  return {
    now = now, gen = gen, cool_until = cool_until, consecutive = consecutive, success = success,
    fails = fails, probe_at = probe_at, ramp_i = ramp_i, ramp_next = ramp_next,
    day_used = day_used, day_reset = day_reset, day_until = day_until, ceiling = ceiling,
    active = active, limited = limited, rate = rate, cycle_ok = cycle_ok, ok = ok,
    ok_since = ok_since, pace = pace, in_flight = in_flight, swept = swept,
    busy_since = busy_since, saved = saved, heard = heard, probe = probe, run_id = run_id,
    tat = {tat1, tat2, tat3, tat4},
  }
end

local function pack_live(s)
  local tat = s.tat
  return struct.pack(LIVE,
    s.now, s.gen, s.cool_until, s.consecutive, s.success, s.fails,
    s.probe_at, s.ramp_i, s.ramp_next, s.day_used, s.day_reset,
    s.day_until, s.ceiling, s.active, s.limited, s.rate,
    s.cycle_ok, s.ok, s.ok_since, s.pace, s.in_flight,
    s.swept, s.busy_since, s.saved,
    tat[1], tat[2], tat[3], tat[4], s.heard, s.probe, s.run_id)
end

