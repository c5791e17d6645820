-- Makes an empty store. KEYS: meta, head, log, ids. ARGV: format, nonce of the log's origin.
local meta = redis.call('GET', KEYS[1])
if meta then
  if meta == ARGV[1] then return {'ok', '0'} end
  return {'foreign', meta}
end
if redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0 then return {'remains'} end
redis.call('HSET', KEYS[2], 'v', '0', 'n', ARGV[2], 'id', '1')
redis.call('SET', KEYS[1], ARGV[1])
return {'ok', '1'}
