-- Entries in order of number, as one consistent picture. KEYS: meta, head, log, ids.
-- ARGV: format, number to start after, last number, limit, start of entry keys.
-- Entry keys are not declared: they are only known here, and share the hash tag of KEYS.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
local found = redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. ARGV[2], ARGV[3],
  'WITHSCORES', 'LIMIT', 0, ARGV[4])
local reply = {'ok'}
for i = 1, #found, 2 do
  reply[#reply + 1] = found[i]
  reply[#reply + 1] = found[i + 1]
  local value = redis.pcall('GET', ARGV[5] .. found[i])
  -- A key of another type is a value that is gone; one that a cluster is moving is not.
  if type(value) == 'table' and not string.find(value.err, 'WRONGTYPE', 1, true) then return value end
  reply[#reply + 1] = type(value) == 'string' and value
end
return reply
