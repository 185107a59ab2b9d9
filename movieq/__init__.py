"""movieq: a job service for film platforms. The parts are in the modules; nothing happens on import."""

__version__ = "0.1.0"
