"""The model table, and which weights are on this machine."""
