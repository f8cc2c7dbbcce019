-- wrk script: posts prepared bodies, one after the other, and reports the rate up to the last answer.
--
--   wrk -t1 -c16 -d8s -s load.lua http://127.0.0.1:8765/embed -- bodies.jsonl 0
--
-- wrk stops at the end of its time and forgets the requests on their way. With requests that take a second
-- that is a tenth of the work, so the rate here is answers / (time of the last answer - start).

local ffi = require("ffi")
ffi.cdef [[
  typedef struct { long seconds; long nanoseconds; } bench_time;
  int clock_gettime(int clock, bench_time *time);
]]
local MONOTONIC = ffi.os == "OSX" and 6 or 1
local time = ffi.new("bench_time")
local threads = {}

local function now()
  ffi.C.clock_gettime(MONOTONIC, time)
  return tonumber(time.seconds) + tonumber(time.nanoseconds) * 1e-9
end

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  bodies = {}
  for line in io.lines(args[1]) do
    bodies[#bodies + 1] = line
  end
  cursor = tonumber(args[2])
  started, last, answered, failed = 0, 0, 0, 0
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  if started == 0 then
    started = now()
  end
  local body = bodies[cursor % #bodies + 1]
  cursor = cursor + 1
  return wrk.format(nil, nil, nil, body)
end

function response(status, headers, body)
  last = now()
  if status >= 200 and status < 300 then
    answered = answered + 1
  else
    failed = failed + 1
  end
end

function done(summary, latency, requests)
  local thread = threads[1]
  local errors = summary.errors
  local failed = thread:get("failed") + errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\nRESULT {"answered": %d, "failed": %d, "seconds": %.6f, "p50_ms": %.3f, "p90_ms": %.3f, "p99_ms": %.3f}\n',
    thread:get("answered"), failed, thread:get("last") - thread:get("started"),
    latency:percentile(50) / 1000, latency:percentile(90) / 1000, latency:percentile(99) / 1000))
end
