-- state.lua: a quota as `status` shows it.
--
-- KEYS     1 hash the quota   2 zset processes that wait
-- returns  now (microseconds), number of processes that wait, fields and values of the hash

local time = redis.call('TIME')
return {
  time[1] * 1000000 + time[2],
  redis.call('ZCARD', KEYS[2]),
  redis.call('HGETALL', KEYS[1]),
}
