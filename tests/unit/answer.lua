-- answer.lua: gives back its first argument; a script for tests.
--
-- returns  ARGV[1]
return ARGV[1]
