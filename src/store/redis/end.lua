-- Opens the store to everybody after an import, also if that was done already. The import's log goes:
-- who knows the store as it was before loads it as a whole.
-- KEYS: meta, head, log, ids. ARGV: format during the import, format.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta == ARGV[2] then return {'ok', '0'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
redis.call('DEL', KEYS[3])
redis.call('SET', KEYS[1], ARGV[2])
return {'ok', '1'}
