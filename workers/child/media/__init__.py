"""Pictures, sound and files, for every engine."""
