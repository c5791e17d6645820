-- Remembers keys for a while. KEYS: meta, head, log, ids, then the keys. ARGV: format, milliseconds.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
for i = 5, #KEYS do redis.call('SET', KEYS[i], '', 'PX', ARGV[2]) end
return {'ok', '1'}
