-- create.lua: a new batch, or the existing one of this id.
--
-- ARGV     1 spec (JSON), 2 identity of its strategy, 3 deadline (ms from now, '' for none),
--          4 token budget, 5 cost budget ('' for none), 6 failure kinds that abort (a,b,),
--          7 keep results (1/0), 8 TTL (s), 9 losses and cut-off calls at which an item is
--          quarantined, 10 most bytes of payloads of failed items that are kept for a retry,
--          11 queue, 12 most calls of one item in a round, 13 of a standing batch: its TTL (s) while
--          items wait, 14 1: somebody is to be told when it is over
-- returns  what happened (new | attached | resumed | conflict), round, items fed, and the stored
--          spec where there was one
--#include batch.lua
local found = load_meta()
local known = call('HGET', META, 'spec')
local identity = call('HGET', META, 'identity')

local function number(position) return tonumber(ARGV[position]) end

if not found then
  for _, name in ipairs({'fed', 'ok', 'failed', 'stopped', 'round', 'rev', 'spent', 'cost', 'priced',
                         'input', 'output', 'cached', 'maybe_billed', 'item_bytes', 'kept_bytes',
                         'out_count', 'out_bytes', 'read_count', 'read_bytes'}) do
    meta[name] = 0
  end
  meta.submitted_at = NOW
  meta.state = 'open'
end

local stopped = found and is_stopped()
-- Whoever sends a further item does not resume what a person has cancelled.
if stopped and meta.standing then return {'attached', meta.round, meta.fed, known} end
local over = found and meta.total and meta.ok + meta.failed >= meta.total
if found and identity and identity ~= ARGV[2] and not (stopped or over) then
  return {'conflict', meta.round, meta.fed, known}
end

if known ~= ARGV[1] then meta.rev = meta.rev + 1 end
if known ~= ARGV[1] or stopped or over then
  meta.deadline = number(3)
  meta.deadline_at = meta.deadline and NOW + meta.deadline
end
meta.token_budget, meta.max_cost = number(4), number(5)
meta.fail_fast, meta.keep = ARGV[6], number(7)
meta.ttl, meta.max_deliveries = number(8), number(9)
meta.kept_limit, meta.max_calls, meta.standing = number(10), number(12), number(13)
meta.hook = number(14)
if meta.standing then meta.total = meta.fed end -- it is never fed to an end
call('HSET', META, 'spec', ARGV[1], 'identity', ARGV[2], 'queue', ARGV[11])
local answer = found and 'attached' or 'new'
if stopped or meta.state == 'finished' then meta.state = 'open' end
if stopped then
  meta.round = meta.round + 1
  meta.reopen, meta.reopen_at = 'stopped', 0
end
if meta.reopen then answer = 'resumed' end -- also one that somebody began and did not end
save_meta()
return {answer, meta.round, meta.fed, known}
