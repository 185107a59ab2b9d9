-- Texts that are stored and sent more than once.

-- Returns at most 2,000 bytes of a text, the most that the 500 characters of an error can have, without cutting a character.
local function cut(text)
  if #text <= 2000 then return text end
  local last = 2000
  while last > 0 and (text:byte(last + 1) or 0) >= 0x80 and text:byte(last + 1) < 0xC0 do last = last - 1 end
  return text:sub(1, last)
end
