"""The worker: claims tasks, drives the engine processes, and stores and delivers their output."""
