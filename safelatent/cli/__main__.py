"""`python -m safelatent.cli` is the command `safelatent`."""

from safelatent.cli import main

main()
