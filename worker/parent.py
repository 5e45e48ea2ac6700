"""What ties a GPU process to its supervisor. Nothing but the standard library: it comes first."""

import ctypes
import faulthandler
import os
import signal
import sys

PARENT = "SAFELATENT_SUPERVISOR"
"""Environment variable: the supervisor's process id."""


def end_with_parent() -> None:
    """In the child: be killed when the supervisor is, whatever this process does (Linux only)."""
    if sys.platform == "linux" and PARENT in os.environ:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):  # it has died already
            os.kill(os.getpid(), signal.SIGKILL)


def show_stacks_when_asked() -> None:
    """In the child: SIGUSR1 prints the stack of every thread, even while none can run."""
    assert sys.__stderr__ is not None
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
