-- configure.lua: create a quota, or change what it allows.
--
-- KEYS     1 hash the quota   2 channel "g:generation"
-- ARGV     1 configuration (JSON)   2 "1": replace a differing one   3 cooldowns   4 ramp (seconds)
--          5.. field, number: the configuration as acquire.lua reads it
-- returns  the configuration in force: not ARGV[1] when another one stood in the way
--
-- A change voids all tickets (they were given at the old rate) and forgets what a cut has taught,
-- and that the day was over.

local Q, CHANNEL, LOOK, TTL = KEYS[1], KEYS[2], 500000, 172800
local RATES = {'rate_r', 'rate_t', 'rate_i', 'rate_o'}
local json, replace = ARGV[1], ARGV[2] == '1'

local function setup_from_arguments(version)
  local setup = {version = version}
  for i = 5, #ARGV, 2 do setup[ARGV[i]] = tonumber(ARGV[i + 1]) end
  return setup
end

-- What is owed beyond the tickets that are void now stays owed, at the new rate.
local function carry_over(live, old, new)
  local time = redis.call('TIME')
  local now = math.max(time[1] * 1000000 + time[2], live.now)
  for d, name in ipairs(RATES) do
    local rate = new[name]
    local owed = live.tat[d] - now - LOOK
    live.tat[d] = now + (owed > 0 and rate > 0 and owed * (old[name] or 0) / rate or 0)
  end
  live.ceiling, live.active, live.limited, live.cycle_ok = 0, 0, 0, 0
  live.day_until = 0                    -- the provider will say so again if it is still over
  live.gen = math.max(live.gen + 1, now)
end

local found = redis.call('HMGET', Q, 'config', 'setup', 'live')
if found[1] and (found[1] == json or not replace) then
  redis.call('EXPIRE', Q, TTL)
  return found[1]
end

local old = found[2] and cmsgpack.unpack(found[2]) or {}
local setup = setup_from_arguments((old.version or 0) + 1)
redis.call('HSET', Q, 'config', json, 'setup', cmsgpack.pack(setup),
  'cooldowns', ARGV[3], 'ramp', ARGV[4])
redis.call('EXPIRE', Q, TTL)
if found[3] then
  local live = unpack_live(found[3])
  carry_over(live, old, setup)
  redis.call('HSET', Q, 'live', pack_live(live))
  redis.call('PUBLISH', CHANNEL, string.format('g:%.0f', live.gen))
end
return json
