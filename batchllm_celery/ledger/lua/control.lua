-- control.lua: a person's decision, or a spent quota's. It changes the state; sweeps follow.
--
-- ARGV     1 pause | resume | cancel | retry | defer, 2 for defer: until (ms)
-- returns  {state, round, 1 when items are to be reopened, else 0, 1 when the budget is spent}
--#include batch.lua
if not load_meta() then return false end
local action, deferred_until = ARGV[1], tonumber(ARGV[2])
state_now()
local stopped, live = is_stopped(), meta.state == 'open' or meta.state == 'paused'

local function reopen(which)
  meta.round = meta.round + 1
  meta.reopen, meta.reopen_at = which, 0
  meta.state = 'open'
  if meta.deadline then meta.deadline_at = NOW + meta.deadline end
end

local spent = (action == 'resume' or action == 'retry') and over_budget()
if action == 'pause' and live then
  meta.state = 'paused'
elseif action == 'cancel' and live then
  meta.state = 'cancelled'
elseif action == 'defer' and live then
  meta.parked_until = math.max(meta.parked_until or 0, deferred_until)
elseif action == 'resume' and not spent then
  meta.parked_until = nil
  if stopped then reopen('stopped') elseif live then meta.state = 'open' end
elseif action == 'retry' and not spent and meta.failed > 0 then
  reopen('failed')
end
local state = state_now()
save_meta()
return {state, meta.round, meta.reopen and 1 or 0, spent and 1 or 0}
