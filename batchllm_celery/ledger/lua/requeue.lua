-- offer.lua: items that no message has brought, for a worker with free slots to enqueue.
--
-- ARGV     1 items at most, 2 milliseconds until they may be offered again,
--          3 1: only what was given back or lost
-- returns  {state, indexes, items ready, items unfinished, process, counter, ...}
--#include batch.lua
if not load_meta() then return false end
check_keys()
local state, indexes = state_now(), {}
if (state == 'feeding' or state == 'running') and tonumber(ARGV[1]) > 0 then
  local latest = ARGV[3] == '1' and AT_ONCE or NOW
  indexes = call('ZRANGEBYSCORE', READY, '-inf', text(latest), 'LIMIT', 0, ARGV[1])
  local marks = {}
  for n, index in ipairs(indexes) do
    marks[2 * n - 1], marks[2 * n] = NOW + tonumber(ARGV[2]), index
  end
  in_chunks('ZADD', READY, marks)
end
save_meta()
-- (What is about to be reopened is unfinished: the batch must not be taken off the queue's list.)
local unfinished = (meta.total or meta.fed + 1) - meta.ok - meta.failed + (meta.reopen and 1 or 0)
return {state, indexes, call('ZCARD', READY), unfinished, call('HGETALL', PROCS)}
