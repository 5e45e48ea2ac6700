"""The frontend: HTTP on one side, the queue on the other. Never imports torch or the worker."""
