-- state.lua: a quota as `status` shows it.
--
-- KEYS     1 QUOTA    hash    2 WAITING    zset    both as in acquire.lua
-- returns  now (microseconds), number of processes that wait, configuration (JSON), live, setup,
--          congestion and headers (records); each of these is "" where there is none
local time = redis.call('TIME')
local found = redis.call('HMGET', KEYS[1], 'config', 'live', 'setup', 'congestion', 'headers')
return {
  time[1] * 1000000 + time[2], redis.call('ZCARD', KEYS[2]), found[1] or '', found[2] or '',
  found[3] or '', found[4] or '', found[5] or '',
}
