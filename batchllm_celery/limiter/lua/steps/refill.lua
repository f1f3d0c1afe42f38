-- 4 refill: what one request and one token cost in time, and what ended calls owe or return.
--
-- A refund moves `tat_us` back (the next start comes sooner), a debt moves it on. `tat_us` never
-- lies more than a burst before now: what nobody used for longer than that is gone.
-- Leaves: limited (the limited dimensions), unit_us (cost of one request or token in a dimension).

-- Of a known rate so much is used: what is left lets the provider's own bucket fill up again.
local HEADROOM = 0.995

local OLDEST_NEWS_US = 10000000   -- how old an answer's call may be for what it says is left

local limited, unit_us = {}, {}
do
  local pace = allowed_pace()
  live_pace = pace
  if not rates_known then rates[1] = pace end
  local share = rates_known and pace * HEADROOM or 1

  -- Reservations that nobody used and whose start lies ahead can be given to others, unless a new
  -- epoch has voided them: then they are returned already.
  local starts, input, output = request_reusable, request_reusable_input, request_reusable_output
  if request_known_epoch ~= live_epoch or new_epoch then starts, input, output = 0, 0, 0 end
  local debt_input, debt_output = request_debt_input - input, request_debt_output - output
  local debts = {-starts, debt_input + debt_output, debt_input, debt_output}

  -- Forfeited tokens (negative) were reserved by first guesses, or for starts that came too late.
  -- While they held the fleet up the provider's bucket of a second was full and took in no more:
  -- returned at once, they would be refused. So they come back only beyond the reserved starts and
  -- a second.
  local forfeited = {
    0, request_forfeited_input + request_forfeited_output,
    request_forfeited_input, request_forfeited_output,
  }
  local far_us = now_us + lookahead_us + 1000000

  for d = 1, 4 do
    if rates[d] > 0 then
      local unit, earliest_us = 1000000 / (rates[d] * share), now_us - setup_burst_us
      limited[#limited + 1], unit_us[d] = d, unit
      local tat = tat_us[d]
      tat = max(tat > 0 and tat or now_us, earliest_us)
      tat = max(tat + debts[d] * unit, earliest_us)
      if told and told[d] >= 0 and told_us < OLDEST_NEWS_US then
        -- Others may use the key: so much is left, and the next call must fit into it. What flows in
        -- pays for our own calls that the answer can't know; a second's worth stays for others'.
        local next_one = 1
        if d > 1 and #estimates >= 8 then
          local input, output = struct.unpack('<I4I4', estimates)
          next_one = (d == 2 and input + output) or (d == 3 and input) or output
        end
        local reserve_us = max(1000000, told_us) + next_one * unit
        tat = max(tat, now_us - max(told[d] * unit - reserve_us, -told_us - 5000000))
      end
      if forfeited[d] < 0 then tat = max(tat + forfeited[d] * unit, min(tat, far_us)) end
      tat_us[d] = tat
    end
  end
end
