"""The settings of each process, read from the source of its settings class.

The source is parsed, not imported: a default such as "cuda where there is one" is then shown as it
is written, and the site needs neither torch nor gradio.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FILES = {
    "Frontend": "service/settings.py",
    "Webhooks": "service/webhooks/settings.py",
    "Worker": "worker/settings.py",
    "Playground": "playground/settings.py",
}


class Setting(NamedTuple):
    name: str
    type: str
    default: str
    meaning: str


def settings(path: Path) -> Iterator[Setting]:
    """Every field of a file's class `Settings`, in order."""
    [cls] = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Settings"
    ]
    prefix = "SAFELATENT_"
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            options = {each.arg: each.value for each in node.value.keywords}
            if "env_prefix" in options:
                prefix = ast.literal_eval(options["env_prefix"])
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield _setting(prefix, node.target.id, node, _docstring(after))


def _setting(prefix: str, name: str, node: ast.AnnAssign, meaning: str) -> Setting:
    variable, value = prefix + name.upper(), node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        options = {each.arg: each.value for each in value.keywords}
        if "validation_alias" in options:
            variable = ast.literal_eval(options["validation_alias"])
        value = options.get("default")
    default = "must be set" if value is None else f"`{ast.unparse(value)}`"
    kind = node.annotation
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
        assert isinstance(kind.slice, ast.Tuple)
        kind = kind.slice.elts[0]
    return Setting(variable, ast.unparse(kind), default, meaning)


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(inspect.cleandoc(str(node.value.value)).split())
    return ""


def page(root: Path) -> str:
    """The page of all settings, in Markdown."""
    lines = [
        "# Settings",
        "",
        "Read from the environment, once, as a process starts. This page is made from the",
        "settings classes. `DEFAULT_MODEL` is `models/emoji_scenes`; `DEFAULT_STORE_URL` is the",
        "folder `.safelatent/store` where the process was started.",
    ]
    for title, file in FILES.items():
        if not (root / file).exists():
            continue
        lines += ["", f"## {title}", "", "| variable | type | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for each in settings(root / file):
            kind = each.type.replace("|", "\\|")
            default = each.default.replace("|", "\\|")
            lines.append(f"| `{each.name}` | `{kind}` | {default} | {each.meaning} |")
    return "\n".join(lines) + "\n"
