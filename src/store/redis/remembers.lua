-- Whether a key is remembered. KEYS: meta, head, log, ids, the key. ARGV: format.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
return {'ok', tostring(redis.call('EXISTS', KEYS[5]))}
