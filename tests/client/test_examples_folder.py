"""The programs of examples/ do what their first lines say."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.client.acting import png
from tests.client.terminal import ROOT, environment

EXAMPLES = ROOT / "examples"


def test_a_web_application_draws(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELATENT_URL", url)
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLES / "fastapi_app.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with TestClient(module.app) as http:
        drawn = http.get("/pictures/a cat", params={"seed": 7})
        assert (drawn.content, drawn.headers["content-type"]) == (png(7), "image/png")
        blocked = http.get("/pictures/an unsafe cat")
        assert blocked.status_code == 451 and "sd_checker" in blocked.json()["detail"]
        refused = http.get("/pictures/a cat", params={"seed": -1})
        assert refused.status_code == 422 and "seed" in refused.json()["detail"]


def test_openais_client_draws(url: str, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "openai_client.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(url), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")


def test_the_notebook_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELATENT_URL", url)
    cells = json.loads((EXAMPLES / "levels.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            *before, last = ast.parse("".join(cell["source"])).body
            if not isinstance(last, ast.Expr):
                before, last = [*before, last], ast.Expr(ast.Constant(None))
            exec(compile(ast.Module(before, []), "cell", "exec"), names)
            expression = ast.fix_missing_locations(ast.Expression(last.value))
            shown.append(eval(compile(expression, "cell", "eval"), names))
    _, generation, undone, size = shown
    assert "<img" in generation._repr_html_()
    names["client"].close()
    assert list(undone) == ["weak", "medium", "strong", "max"] and size == (64, 32)
