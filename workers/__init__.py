"""The worker: claims tasks, drives its engines' processes, stores and delivers what they make."""
