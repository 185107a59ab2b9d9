"""The engine of diffusers and transformers."""
