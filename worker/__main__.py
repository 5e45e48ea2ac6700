"""`python -m worker`: a supervisor, and under it the process that holds the model."""

import sys

from worker.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
