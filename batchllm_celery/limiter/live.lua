-- live.lua: how a quota's moving state is stored; put before each script of the limiter.
--
-- Every permit costs one reading and one writing of it, so it is a struct: a msgpack map took three
-- times as long.

-- What came later stands at the end: an older version reads what it knows, and a newer one what an
-- older one has written.
local LIVE, LATER = '<' .. string.rep('d', 33) .. 'ss', '<ddd'

local function unpack_live(packed)
  local v = {struct.unpack(LIVE, packed)}
  local at, full = v[36], {0, 0, 0}
  if at <= #packed then full = {struct.unpack(LATER, packed, at)} end
  return {
    now = v[1], gen = v[2], cool_until = v[3], consecutive = v[4], success = v[5], fails = v[6],
    probe_at = v[7], ramp_i = v[8], ramp_next = v[9], day_used = v[10], day_reset = v[11],
    day_until = v[12], ceiling = v[13], active = v[14], limited = v[15], rate = v[16],
    cycle_ok = v[17], ok = v[18], ok_since = v[19], pace = v[20], in_flight = v[21],
    swept = v[22], busy_since = v[23], saved = v[24],
    tat = {v[25], v[26], v[27], v[28]}, credit = {v[29], v[30], v[31], v[32]},
    heard = v[33], probe = v[34], run_id = v[35], full = {0, full[1], full[2], full[3]},
  }
end

local function pack_live(s)
  local tat, credit, full = s.tat, s.credit, s.full
  return struct.pack(LIVE,
    s.now, s.gen, s.cool_until, s.consecutive, s.success, s.fails,
    s.probe_at, s.ramp_i, s.ramp_next, s.day_used, s.day_reset,
    s.day_until, s.ceiling, s.active, s.limited, s.rate,
    s.cycle_ok, s.ok, s.ok_since, s.pace, s.in_flight,
    s.swept, s.busy_since, s.saved,
    tat[1], tat[2], tat[3], tat[4], credit[1], credit[2], credit[3], credit[4],
    s.heard, s.probe, s.run_id)
    .. struct.pack(LATER, full[2], full[3], full[4])
end

