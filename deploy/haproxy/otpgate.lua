-- Asks otpgate whether a request may pass: `http-request lua.otpgate`.
--
-- The variable `txn.otpgate` is `passes` if it may; then the request has the identity that was proven in place of what
-- the client says, and no token. If it may not, the client gets the gate's answer, or 503 if there is none.

local URL = os.getenv("OTPGATE") .. "/authz/forward-auth"
-- Of each attempt; HAProxy makes four.
local TIMEOUT_MS = 2500
-- As in the gate's [headers].
local IDENTITY = { "x-auth-name", "x-auth-realm" }
local TOKEN = "x-auth-token"
-- Headers of a refusal that its receiver should have.
local ANSWERED = { "content-type", "www-authenticate", "retry-after", "allow", "x-request-id", "cache-control" }

-- What belongs to the request itself, or is told of it here, or is removed in any spelling by haproxy.cfg.
local function is_ours(name)
    local plain = name:gsub("%W", "-")
    return plain:find("^x%-forwarded") or plain:find("^x%-original") or name == "host" or name == "connection"
        or name == "content-length" or name == "transfer-encoding" or name == "upgrade" or name == "expect"
        or name == "te" or name == "trailer" or name == "keep-alive" or name:find("^proxy%-")
end

-- All other headers go to the gate, so that it can refuse those that are there twice or misspelled.
local function question(txn)
    local headers = {}
    for name, values in pairs(txn.http:req_get_headers()) do
        if not is_ours(name) then
            local list = {}
            for at = 0, #values do
                list[#list + 1] = values[at]
            end
            headers[name] = list
        end
    end
    headers["x-forwarded-method"] = { txn.sf:method() }
    headers["x-forwarded-host"] = { txn.sf:req_fhdr("host") }
    headers["x-forwarded-uri"] = { txn.sf:pathq() }
    headers["x-forwarded-for"] = { txn.sf:src() }
    return headers
end

local function refuse(txn, answer)
    local headers = {}
    for _, name in ipairs(ANSWERED) do
        local values = answer.headers and answer.headers[name]
        if values then
            headers[name] = { values[0] }
        end
    end
    local is_refusal = answer.status and answer.status >= 400
    txn:done(txn:reply({
        status = is_refusal and answer.status or 503,
        headers = headers,
        body = is_refusal and answer.body or "",
    }))
end

core.register_action("otpgate", { "http-req" }, function(txn)
    txn:set_var("txn.otpgate", "refused")
    local answer = core.httpclient():get({ url = URL, headers = question(txn), timeout = TIMEOUT_MS })
    if answer.status ~= 200 then
        return refuse(txn, answer)
    end
    for _, name in ipairs(IDENTITY) do
        local values = answer.headers[name]
        local value = values and values[0]
        if value and value ~= "" then
            txn.http:req_set_header(name, value)
        else
            txn.http:req_del_header(name)
        end
    end
    txn.http:req_del_header(TOKEN)
    txn:set_var("txn.otpgate", "passes")
end, 0)
