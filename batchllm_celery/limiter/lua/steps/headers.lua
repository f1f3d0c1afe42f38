-- 0 headers: what the provider says of its limits in its answers, for the whole fleet.
--
-- A limit in a header is the ceiling of its dimension from the first answer on; where a lower one
-- is configured, that one. What is left (`remaining`) only ever lowers what may start: step 4.
-- Headers bind the quota that bears the name of their provider and model; others only show them.
-- Leaves: rates (with the headers' limits), told (of this request: what is left, in its order of
-- dimensions; nil: nothing), told_us (how long ago that was), new_headers (nil: nothing new).

local told, told_us, new_headers
if stored[4] or ARGV[6] ~= '' then
  --#read headers stored[4]
  if ARGV[6] ~= '' then
    --#read report ARGV[6]
    if headers_at_us == 0 and report_binds == 1 and not (rates[1] + rates[2] + rates[3] + rates[4] > 0)
        then
      live_w_max, live_curve_time_s = 0, 0    -- a rate that was searched for is no share of these
    end
    headers_binds, headers_at_us = report_binds, live_now_us
    if report_requests_per_second > 0 then
      headers_requests_per_second = report_requests_per_second
    end
    if report_tokens_per_second > 0 then headers_tokens_per_second = report_tokens_per_second end
    if report_input_per_second > 0 then headers_input_per_second = report_input_per_second end
    if report_output_per_second > 0 then headers_output_per_second = report_output_per_second end
    if report_requests_per_day > 0 then headers_requests_per_day = report_requests_per_day end
    if report_binds == 1 then
      told, told_us = {
        report_remaining_requests, report_remaining_tokens,
        report_remaining_input, report_remaining_output,
      }, report_age_us
    end
    --#pack headers
    new_headers = headers_packed
  end
  if headers_binds == 1 then
    local limits = {
      headers_requests_per_second, headers_tokens_per_second,
      headers_input_per_second, headers_output_per_second,
    }
    for d = 1, 4 do
      if limits[d] > 0 and (rates[d] == 0 or limits[d] < rates[d]) then rates[d] = limits[d] end
    end
  end
end
