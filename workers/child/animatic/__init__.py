"""The engine without weights: boards become a timed clip with camera, captions and sound."""
