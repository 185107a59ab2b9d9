-- Hosts of callback URLs. Whether a host answers is recorded for each project, so that a receiver of one project does not hold up the
-- webhooks of other projects to the same host.

-- Returns the host of a URL with its port, in lower case; '' if there is none.
local function host_of(url)
  return string.lower(string.sub(string.match(url or '', '^%a[%w+.-]*://([^/?#]*)') or '', 1, 255))
end

-- Returns what a receiver is named by in keys: its host and the project.
local function receiver_of(project, url)
  return host_of(url) .. ' ' .. (project or '')
end
