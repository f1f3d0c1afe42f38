-- configure.lua: create a quota, or change what it allows.
--
-- KEYS     1 QUOTA    hash     as in acquire.lua    2 CHANNEL    channel  "epoch:N"
-- ARGV     1 the configuration (JSON)    2 "1": replace a differing one
--          3 setup (a record: the configuration as acquire.lua reads it)
--          4 cooldowns    5 ramp (both in seconds, with commas)
-- returns  the configuration in force: not ARGV[1] when another one stood in the way
--
-- A change begins a new epoch: reservations were made at the old rate, and are void. What a cut has
-- taught is forgotten, and so is that the day was over: the provider will say so again if it still
-- is.

--#include constants.lua
local QUOTA, CHANNEL = KEYS[1], KEYS[2]
local json, replace = ARGV[1], ARGV[2] == '1'

local found = redis.call('HMGET', QUOTA, 'config', 'setup', 'live')
if found[1] and (found[1] == json or not replace) then
  redis.call('EXPIRE', QUOTA, KEYS_KEPT_S)
  return found[1]
end

redis.call('HSET', QUOTA, 'config', json, 'setup', ARGV[3], 'cooldowns', ARGV[4], 'ramp', ARGV[5])
redis.call('HDEL', QUOTA, 'congestion', 'headers')
redis.call('EXPIRE', QUOTA, KEYS_KEPT_S)
if found[3] then
  local old, new, live = read_setup(found[2]), read_setup(ARGV[3]), read_live(found[3])
  local time = redis.call('TIME')
  local now_us = math.max(time[1] * 1000000 + time[2], live.now_us)
  -- What is owed beyond the void reservations stays owed, at the new rate.
  for tat, rate in pairs({
    tat_requests_us = 'requests_per_second', tat_tokens_us = 'tokens_per_second',
    tat_input_us = 'input_tokens_per_second', tat_output_us = 'output_tokens_per_second',
  }) do
    local owed_us = live[tat] - now_us - LOOKAHEAD_US
    local at_new_rate = owed_us > 0 and new[rate] > 0
    live[tat] = now_us + (at_new_rate and owed_us * old[rate] / new[rate] or 0)
  end
  live.w_max, live.curve_time_s, live.rate_limited_until_us, live.successes_since_cut = 0, 0, 0, 0
  live.exhausted_until_us = 0
  live.search_rate = new.full_speed == 1 and FULL_SPEED or START_RATE
  live.epoch = math.max(live.epoch + 1, now_us)
  redis.call('HSET', QUOTA, 'live', pack_live(live))
  redis.call('PUBLISH', CHANNEL, string.format('epoch:%.0f', live.epoch))
end
return json
