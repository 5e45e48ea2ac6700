"""Pages of the site that live outside docs/, and links to them.

The repository's own pages are read where they are, by links that work there too.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

OUTSIDE = {
    "models/emoji_scenes/README.md": "reference/model.md",
    "SECURITY.md": "reference/reporting.md",
    "CHANGELOG.md": "reference/changelog.md",
}
LINK = re.compile(r"\]\((?:\.\./)*(" + "|".join(map(re.escape, OUTSIDE)) + r")\)")


def inside(markdown: str) -> str:
    """Links to pages outside docs/ as links to their copies inside."""
    return LINK.sub(lambda link: f"](/{OUTSIDE[link[1]]})", markdown)


def copies(root: Path) -> dict[str, str]:
    """Each page outside docs/, by its name inside without the suffix."""
    return {new.removesuffix(".md"): (root / old).read_text() for old, new in OUTSIDE.items()}


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = inside(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
