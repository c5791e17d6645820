-- Closes a new or empty store for an import; answers 0, and does nothing, if it has entries.
-- KEYS: meta, head, log, ids. ARGV: format, what it is during the import, nonce of the log's origin.
local meta = redis.call('GET', KEYS[1])
if meta == ARGV[2] then return {'ok', '1'} end
if meta and meta ~= ARGV[1] then return {'foreign', meta} end
if meta then
  if redis.call('EXISTS', KEYS[4]) == 1 then return {'ok', '0'} end
else
  if redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0 then return {'remains'} end
  redis.call('HSET', KEYS[2], 'v', '0', 'n', ARGV[3], 'id', '1')
end
redis.call('SET', KEYS[1], ARGV[2])
return {'ok', '1'}
