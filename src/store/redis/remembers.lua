-- Whether a key is remembered. KEYS: the key. ARGV: format, name of meta.
-- `meta` is not declared: it is only read, and shares the hash tag of KEYS.
local meta = redis.call('GET', ARGV[2])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
return {'ok', tostring(redis.call('EXISTS', KEYS[1]))}
