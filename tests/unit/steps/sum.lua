-- sum.lua: a script of two steps, for a test.
local first = 1
--#include second.lua
return first + second
