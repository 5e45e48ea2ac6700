"""The command line: `safelatent key new` works with the SDK alone, the rest with extra `cli`."""

import sys
from collections.abc import Sequence

from safelatent.cli import keys


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["key"]:
        keys.main(words)
        return
    try:
        from safelatent.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        said = "the command line needs two more packages: pip install 'safelatent[cli]'"
        print(f"safelatent: {said}", file=sys.stderr)
        sys.exit(2)
    app(words, prog_name="safelatent")
