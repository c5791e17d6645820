-- Records a use of a token, if its budget allows. KEYS: who used the token.
-- ARGV: format, name of meta, who uses it, budget, milliseconds to keep.
-- `meta` is not declared: it is only read, and shares the hash tag of KEYS.
local meta = redis.call('GET', ARGV[2])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
if redis.call('SISMEMBER', KEYS[1], ARGV[3]) == 1 then return {'ok', '1'} end
local used = redis.call('SCARD', KEYS[1])
if used >= tonumber(ARGV[4]) then return {'ok', '0'} end
redis.call('SADD', KEYS[1], ARGV[3])
-- From the first use on: the token ends then, however often it is used.
if used == 0 then redis.call('PEXPIRE', KEYS[1], ARGV[5]) end
return {'ok', '1'}
