"""Pictures, sound and files, whatever engine makes them."""
