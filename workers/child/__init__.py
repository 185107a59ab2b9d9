"""The engine process: synchronous, without asyncio and Redis. Started as `python -P -m workers.child`; nobody imports it."""
