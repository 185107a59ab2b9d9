"""Downloads of inputs, and the guard that keeps requests out of private networks."""
