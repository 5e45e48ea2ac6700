"""The command in a terminal of its own: a real pseudo-terminal, with a width, and keys to press."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(url: str, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "SAFELATENT_URL": url, **more}


def _of_its_own() -> None:
    """In the new process: the terminal is its own, and Ctrl-C works even where the tests run in the
    background and ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """Runs `safelatent` so that stdin, stdout and stderr are a terminal."""

    def __init__(self, url: str, cwd: Path, *words: str, columns: int = 80, **variables: str):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "safelatent.cli", *words],
            cwd=cwd,
            env=environment(url, TERM="xterm-256color", **variables),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_of_its_own,
        )
        os.close(theirs)

    def until(self, words: str) -> None:
        """Read until the screen has shown this."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.text():
            assert self._read(deadline), f"{words!r} is not in {self.text()!r}"

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def end(self) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline):
            pass
        os.close(self._ours)
        return self._process.wait(PATIENCE_S)

    def text(self) -> str:
        """All that was shown, without colours and movements."""
        return ESCAPES.sub("", self.shown)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))[0]:
            self._process.kill()
            return False
        try:
            piece = os.read(self._ours, 65536)
        except OSError:  # the other end is closed
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)
