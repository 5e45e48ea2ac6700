"""Delivers webhooks, in a process of its own: `python -m service.webhooks`."""
