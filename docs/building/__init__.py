"""What turns docs/ into the site beyond Sphinx itself; see docs/conf.py."""
