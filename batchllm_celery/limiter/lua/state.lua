-- state.lua: a quota as `status` shows it.
--
-- KEYS     1 hash the quota   2 zset processes that wait
-- returns  now (microseconds), number of processes that wait, configuration (JSON, or ""),
--          then names and values of the numbers in `setup` and `live`

local time = redis.call('TIME')
local found = redis.call('HMGET', KEYS[1], 'config', 'setup', 'live')
local reply = {time[1] * 1000000 + time[2], redis.call('ZCARD', KEYS[2]), found[1] or ''}

local function add(name, value)
  if type(value) == 'number' then
    reply[#reply + 1], reply[#reply + 2] = name, string.format('%.6f', value)
  end
end

for _, part in ipairs({
  found[2] and cmsgpack.unpack(found[2]) or {}, found[3] and unpack_live(found[3]) or {},
}) do
  for name, value in pairs(part) do
    if type(value) == 'table' then
      for d, dimension in ipairs({'r', 't', 'i', 'o'}) do add(name .. '_' .. dimension, value[d]) end
    else
      add(name, value)
    end
  end
end
return reply
