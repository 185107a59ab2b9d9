-- Hosts of callback URLs. Whether a host answers is recorded for each project: what one project's receiver does on a host that others use,
-- too, is nothing to them.

-- Returns the host of a URL with its port, in lower case; '' if there is none.
local function host_of(url)
  return string.lower(string.sub(string.match(url or '', '^%a[%w+.-]*://([^/?#]*)') or '', 1, 255))
end

-- Returns what a receiver is named by in keys: its host and the project.
local function receiver_of(project, url)
  return host_of(url) .. ' ' .. (project or '')
end
