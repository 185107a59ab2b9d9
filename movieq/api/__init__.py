"""The HTTP API. A request is decoded and authorised, runs one script in Redis, and is answered; only open streams hold state."""
