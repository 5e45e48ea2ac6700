"""Writes the pages that are made from code, so that they cannot drift: docs/reference and
docs/problems, which git ignores."""

import json
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

import safelatent
from building import links, problems, rest, settings
from safelatent.cli.app import app

TWINS = "Async"
"""Classes of this prefix have the members of the class without it, to be awaited."""


def write(docs: Path) -> None:
    root = docs.parent
    made = links.copies(root) | {
        "reference/rest": rest.page(json.loads((docs / "openapi.json").read_text())),
        "reference/settings": settings.page(root),
        "reference/sdk": sdk(),
        "reference/cli": cli(),
        "reference/problems": problems.index(),
    }
    for slug, page in problems.pages():
        made[f"problems/{slug}"] = page
    for folder in ("reference", "problems"):
        (docs / folder).mkdir(exist_ok=True)
        for old in (docs / folder).glob("*.md"):
            if f"{folder}/{old.stem}" not in made:
                old.unlink()
    for name, page in made.items():
        path = docs / f"{name}.md"
        if not path.exists() or path.read_text() != page:  # an unchanged page is not read again
            path.write_text(page)


def sdk() -> str:
    """The public names of the package, by autodoc."""
    lines = ["# SDK", "", "The names of `safelatent`, from their docstrings.", ""]
    lines += ["```{eval-rst}"]
    for name in sorted(safelatent.__all__, key=lambda name: (name.startswith(TWINS), name)):
        this = getattr(safelatent, name)
        if not isinstance(this, type):
            continue
        lines += [f".. autoclass:: safelatent.{name}"]
        if name.startswith(TWINS):
            lines += ["", f"   The members of `{name.removeprefix(TWINS)}`, to be awaited.", ""]
        else:
            lines += ["   :members:", "   :exclude-members: model_config, model_post_init", ""]
    lines += ["```"]
    return "\n".join(lines) + "\n"


def cli() -> str:
    """Every command's help, by typer's own writer of docs."""
    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="safelatent")
