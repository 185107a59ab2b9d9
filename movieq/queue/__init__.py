"""Tasks in Redis. Each verb is one Lua script and one method of `Store`; `Queries` only reads."""
