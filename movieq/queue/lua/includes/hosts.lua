-- Hosts of callback URLs.

-- Returns the host of a URL with its port, in lower case; '' if there is none.
local function host_of(url)
  return string.lower(string.sub(string.match(url or '', '^%a[%w+.-]*://([^/?#]*)') or '', 1, 255))
end
