"""movieq on one machine: everything in one command, the checks and the demo."""
