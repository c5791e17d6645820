-- Gives no number below ARGV[2] from now on. KEYS: meta, head, log, ids. ARGV: format, number.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
local id = redis.call('HGET', KEYS[2], 'id')
if not id then return {'headless'} end
if tonumber(id) < tonumber(ARGV[2]) then redis.call('HSET', KEYS[2], 'id', ARGV[2]) end
return {'ok', '1'}
