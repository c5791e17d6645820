-- Does a batch or nothing. KEYS: meta, head, log, ids, then each mutation's entry.
-- ARGV: format, nonce, keys for the log, retention; then for each mutation its member of ids,
-- expected revision ('' for absent), number ('' to delete), blob. Revision 0 is a value that is gone,
-- though it is in ids, or does not say.
-- All reading comes first, then the log, then the rest, entries last: Redis does not roll a failed script
-- back, and then followers look, and find no entry that nobody who loads all would find.
local meta = redis.call('GET', KEYS[1])
if not meta then return {'absent'} end
if meta ~= ARGV[1] then return {'foreign', meta} end
local head = redis.call('HMGET', KEYS[2], 'v', 'n', 'id')
if not (head[1] and head[2] and head[3]) then return {'headless'} end
local version, nonce, next_id = tonumber(head[1]), head[2], tonumber(head[3])

-- The log may be ahead of head, if a script failed halfway; it may be behind only if it was cut.
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
if last then
  local logged = tonumber(string.match(last[1], '^%d+'))
  if logged >= version then
    version = logged
    for i = 1, #last[2], 2 do
      if last[2][i] == 'n' then nonce = last[2][i + 1] end
    end
  end
end

local batch, deleted = {}, {}
for i = 5, #KEYS do
  local at = 4 * (i - 4)
  local m = {key = KEYS[i], member = ARGV[at + 1], expect = ARGV[at + 2], id = ARGV[at + 3],
    blob = ARGV[at + 4]}
  batch[#batch + 1] = m
  if m.id == '' then deleted[m.member] = true end
end
for _, m in ipairs(batch) do
  local value = redis.pcall('GET', m.key)
  local revision = ''
  if type(value) == 'string' then
    revision = string.match(value, '^(%d+):') or '0'
  elseif m.expect == '0' and redis.call('ZSCORE', KEYS[4], m.member) then
    revision = '0'
  end
  if revision ~= m.expect then return {'conflict'} end
  if m.id ~= '' then
    for _, owner in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], m.id, m.id)) do
      if owner ~= m.member and not deleted[owner] then return {'conflict'} end
    end
    next_id = math.max(next_id, tonumber(m.id) + 1)
  end
end

local text = string.format('%.0f', version + 1)
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], text .. '-0',
  'n', ARGV[2], 'p', nonce, 'k', ARGV[3])
redis.call('HSET', KEYS[2], 'v', text, 'n', ARGV[2], 'id', string.format('%.0f', next_id))
for _, m in ipairs(batch) do
  if m.id == '' then
    redis.call('DEL', m.key)
    redis.call('ZREM', KEYS[4], m.member)
  end
end
for _, m in ipairs(batch) do
  if m.id ~= '' then
    redis.call('ZADD', KEYS[4], m.id, m.member)
    redis.call('SET', m.key, text .. ':' .. m.id .. ':' .. m.blob)
  end
end
return {'ok', text}
