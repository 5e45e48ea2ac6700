"""A page to try the service in: two safety levels of one seed, side by side.

A process of its own. It reaches the service through `safelatent.client`, in `talk.py` alone.
"""
