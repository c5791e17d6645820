-- Records a use of a token, if its budget allows. KEYS: meta, head, log, ids, who used the token.
-- ARGV: format, who uses it, budget, milliseconds to keep.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
if redis.call('SISMEMBER', KEYS[5], ARGV[2]) == 1 then return {'ok', '1'} end
local used = redis.call('SCARD', KEYS[5])
if used >= tonumber(ARGV[3]) then return {'ok', '0'} end
redis.call('SADD', KEYS[5], ARGV[2])
-- From the first use on: the token ends then, however often it is used.
if used == 0 then redis.call('PEXPIRE', KEYS[5], ARGV[4]) end
return {'ok', '1'}
