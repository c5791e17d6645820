-- Counts failures, as Quota does. KEYS: each failure's bucket.
-- ARGV: format, name of meta; then for each failure its quota: interval, failures, horizon.
-- `meta` is not declared: it is only read, and shares the hash tag of KEYS.
-- All times are whole microseconds, which Lua's numbers hold exactly until the year 2255.
local meta = redis.call('GET', ARGV[2])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local reply = {'ok'}
for i = 1, #KEYS do
  local at = 3 * i
  local interval, failures, horizon = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local level = tonumber(redis.call('GET', KEYS[i]) or 0)
  level = math.min(math.max(level, now) + interval, now + horizon)
  -- Gone when it has drained.
  redis.call('SET', KEYS[i], string.format('%.0f', level),
    'PX', string.format('%.0f', math.ceil((level - now) / 1000)))
  reply[#reply + 1] = string.format('%.0f', math.max(level - now - interval * (failures - 1), 0))
end
return reply
