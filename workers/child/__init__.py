"""The engine's process: synchronous, knows neither asyncio nor Redis. Started as `python -m workers.child`, imported by nobody."""
