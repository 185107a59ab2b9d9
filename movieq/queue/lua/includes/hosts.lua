-- Hosts of callback URLs. Whether a host answers is recorded for each project, so that a receiver of one project does not hold up the
-- webhooks of other projects to the same host.
-- include: time

local LONGEST_MS = 600000 -- most time that a host gets no webhooks

-- Returns a stored time; 0 if it is more than most_ms ahead: then it was stored before the clock was set back, and is over.
local function valid(at_ms, most_ms)
  at_ms = tonumber(at_ms or '') or 0
  return at_ms <= now + most_ms and at_ms or 0
end

-- Returns the host of a URL with its port, in lower case; '' if there is none.
local function host_of(url)
  return string.lower(string.sub(string.match(url or '', '^%a[%w+.-]*://([^/?#]*)') or '', 1, 255))
end

-- Returns what a receiver is named by in keys: its host and the project.
local function receiver_of(project, url)
  return host_of(url) .. ' ' .. (project or '')
end
