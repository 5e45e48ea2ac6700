"""`python -m worker.child`: what a supervisor starts. It becomes the process that holds the model.

Importing torch takes seconds, and a supervisor may die in them: whoever is left alone, or stands
still, before `main` must die with it too. So nothing is imported before the ties are made.
"""

import sys

from worker.parent import end_with_parent, show_stacks_when_asked

if __name__ == "__main__":
    end_with_parent()
    show_stacks_when_asked()
    from worker.process import main

    sys.exit(main())
