-- Gives out the next number. KEYS: meta, head, log, ids. ARGV: format, largest number. That one itself
-- is never given out: Lua could not tell the number after it from it.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
local id = redis.call('HGET', KEYS[2], 'id')
if not id then return {'headless'} end
if tonumber(id) >= tonumber(ARGV[2]) then return {'full'} end
redis.call('HINCRBY', KEYS[2], 'id', 1)
return {'ok', id}
