"""The HTTP API: decode, authorise, one script, encode. Keeps nothing but open streams."""
