-- lock.lua: the right to feed a batch, or to trim its results. Leased on the server's clock.
--
-- ARGV     1 take | renew | release, 2 consumer | producer, 3 owner, 4 lease (ms),
--          5 for take: a dead owner that may be replaced ('' for none)
-- returns  {1, owner} when it is (or was) the caller's, else {0, who holds it, for how long (ms)}
--#include batch.lua
if not load_meta() then return false end
local action, role, owner, lease, dead = unpack(ARGV)
local field = 'lock:' .. role
local held = call('HGET', META, field)
local until_ms, holder = string.match(held or '', '^(%d+) (.*)$')
local free = not holder or tonumber(until_ms) <= NOW or holder == owner
  or (action == 'take' and dead ~= '' and holder == dead)
if holder and not free then return {0, holder, tonumber(until_ms) - NOW} end
if action == 'release' then
  call('HDEL', META, field)
else
  call('HSET', META, field, text(NOW + tonumber(lease)) .. ' ' .. owner)
end
save_meta()
return {1, owner, 0}
