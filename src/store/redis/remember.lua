-- Remembers keys for a while. KEYS: the keys. ARGV: format, name of meta, milliseconds.
-- `meta` is not declared: it is only read, and shares the hash tag of KEYS.
local meta = redis.call('GET', ARGV[2])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
for i = 1, #KEYS do redis.call('SET', KEYS[i], '', 'PX', ARGV[3]) end
return {'ok', '1'}
