"""Makes the blocking client from the one that awaits: `python tools/unasync.py`.

    safelatent/client/asynchronous.py -> safelatent/client/synchronous.py

Words are replaced, then ruff lays the lines out. `--check` only says whether the file is current.
"""

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "safelatent" / "client"
SOURCE, MADE = CLIENT / "asynchronous.py", CLIENT / "synchronous.py"

HEADER = '''"""The client for code that blocks.

Made from asynchronous.py by `python tools/unasync.py`; write there, and never here.
"""
'''
WORDS = {
    r"async (def|for|with)\b": r"\1",
    r"await ": "",
    r"\baclosing\b": "closing",
    r"\bAsyncGenerator\b": "Generator",
    r"\basync_(sleep|shield)\b": r"\1",
    r"\bAsync(Client|Generation|Image|Page)\b": r"\1",
    r"\b__aenter__\b": "__enter__",
    r"\b__aexit__\b": "__exit__",
    r"\ba(close|read|iter_bytes)\b": r"\1",
}


def blocking(source: str) -> str:
    """The source of the blocking client."""
    _, _, code = source.removeprefix('"""').partition('"""\n')
    for pattern, word in WORDS.items():
        code = re.sub(pattern, word, code)
    made = HEADER + code
    for command in (
        ["check", "--select", "I,UP028", "--fix", "--unsafe-fixes", "-q"],
        ["format", "-q"],
    ):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", MADE, "-"]
        made = subprocess.run(ruff, input=made, capture_output=True, text=True, check=True).stdout
    return made


def main() -> int:
    made = blocking(SOURCE.read_text())
    if "--check" in sys.argv:
        if MADE.read_text() != made:
            print(f"{MADE.name} is not current: python tools/unasync.py", file=sys.stderr)
            return 1
        return 0
    MADE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
