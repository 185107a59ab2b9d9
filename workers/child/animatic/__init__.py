"""The engine without weights: boards become a timed clip with camera moves, captions and sound."""
