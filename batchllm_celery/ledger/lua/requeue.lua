-- requeue.lua: items that no message has brought, for a worker with free slots to send messages for.
--
-- ARGV     1 most items, 2 milliseconds until they may be requeued again, 3 1: only items that
--          were released or lost
-- returns  {state, indexes, items ready, items unfinished, process, counter, ..., Celery tasks that
--          wait although their items are done: index, task, ...; the round that has ended, if whoever
--          is to be told of it is to be told now, else -1}
--#include batch.lua
if not load_meta() then return false end
check_keys()
local most, again, lost_only = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local state, indexes = state_now(), {}
if (state == 'feeding' or state == 'running') and most > 0 then
  local latest = lost_only and AT_ONCE or NOW
  indexes = call('ZRANGEBYSCORE', READY, '-inf', text(latest), 'LIMIT', 0, most)
  local marks = {}
  for n, index in ipairs(indexes) do
    marks[2 * n - 1], marks[2 * n] = NOW + again, index
  end
  in_chunks('ZADD', READY, marks)
end
local owed = {}
if meta.standing then
  local due = call('ZRANGEBYSCORE', OWED, '-inf', text(NOW), 'LIMIT', 0, 100)
  for _, index in ipairs(due) do
    call('ZADD', OWED, NOW + OWED_AFTER, index)
    owed[#owed + 1] = index
    owed[#owed + 1] = call('HGET', TASKS, index) or ''
  end
end
local untold = meta.hook == 1 and meta.total and not meta.reopen
  and meta.ok + meta.failed >= meta.total and (meta.hook_round or -1) < meta.round
local tell = -1
if untold and NOW - (meta.hook_at or 0) > OWED_AFTER then meta.hook_at, tell = NOW, meta.round end
save_meta()
-- A batch that is about to be reopened stays on the queue's list.
local unfinished = (meta.total or meta.fed + 1) - meta.ok - meta.failed + (meta.reopen and 1 or 0)
if meta.standing then unfinished = unfinished + call('ZCARD', OWED) end
if untold then unfinished = unfinished + 1 end
return {state, indexes, call('ZCARD', READY), unfinished, call('HGETALL', PROCS), owed, tell}
