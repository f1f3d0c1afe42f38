-- lookup.lua: outcomes of single items of a standing batch.
--
-- ARGV     1 1: for the Celery tasks that await them, then indexes
-- returns  for each item {its entry of the stream, or '', its task, or ''}; nothing is written
--#include batch.lua
if not load_meta() then return false end
local found, with_tasks = {}, ARGV[1] == '1'
for at = 2, #ARGV do
  local place = call('HGET', PLACES, ARGV[at])
  local entry = place and call('XRANGE', OUT, place, place)[1]
  local task = with_tasks and call('HGET', TASKS, ARGV[at])
  found[#found + 1] = {entry or '', task or ''}
end
return found
