-- What acquire.lua and configure.lua both need to know.
local LOOKAHEAD_US = 500000       -- how far ahead of now starts are reserved at most, microseconds
local KEYS_KEPT_S = 172800        -- how long a quota's keys are kept after its last use, seconds

