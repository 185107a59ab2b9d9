"""Tasks in Redis: one Lua script and one method for each verb, and the reads beside them."""
