"""Delivery of ended tasks: webhooks, and documents in a PayloadCMS."""
