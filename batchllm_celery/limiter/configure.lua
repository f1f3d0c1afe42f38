-- configure.lua: create a quota, or change what it allows.
--
-- KEYS     1 hash the quota   2 channel "g:generation"
-- ARGV     1 configuration (JSON)   2 "1": replace a differing one
--          3.. field, value: the configuration as acquire.lua reads it
-- returns  the configuration in force: not ARGV[1] when another one stood in the way
--
-- A change voids all tickets (they were given at the old rate) and forgets what a cut has taught.

local Q, CHANNEL, LOOK, TTL = KEYS[1], KEYS[2], 500000, 172800
local json, replace = ARGV[1], ARGV[2] == '1'

local old = redis.call('HMGET', Q, 'config', 'version', 'gen', 'now', 'rate_r', 'rate_t', 'rate_i',
  'rate_o', 'tat_r', 'tat_t', 'tat_i', 'tat_o')
if old[1] and (old[1] == json or not replace) then
  redis.call('EXPIRE', Q, TTL)
  return old[1]
end

local fields = {'config', json, 'version', (tonumber(old[2]) or 0) + 1}
for i = 3, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('HSET', Q, unpack(fields))
redis.call('EXPIRE', Q, TTL)

if old[3] then
  local time = redis.call('TIME')
  local now = math.max(time[1] * 1000000 + time[2], tonumber(old[4]) or 0)
  local gen = math.max(tonumber(old[3]) + 1, now)
  local new = redis.call('HMGET', Q, 'rate_r', 'rate_t', 'rate_i', 'rate_o')
  for d, name in ipairs({'r', 't', 'i', 'o'}) do
    local rate, owed = tonumber(new[d]) or 0, (tonumber(old[8 + d]) or 0) - now - LOOK
    local debt = owed > 0 and rate > 0 and owed * (tonumber(old[4 + d]) or 0) / rate or 0
    redis.call('HSET', Q, 'tat_' .. name, now + debt, 'cr_' .. name, 0)
  end
  redis.call('HDEL', Q, 'ceiling', 'active', 'limited', 'cycle_ok')
  redis.call('HSET', Q, 'gen', gen)
  redis.call('PUBLISH', CHANNEL, string.format('g:%.0f', gen))
end
return json
