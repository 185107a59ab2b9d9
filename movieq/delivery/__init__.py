"""Webhooks and PayloadCMS."""
