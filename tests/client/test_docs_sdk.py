"""The code blocks of docs/sdk.md, docs/cli.md and the README's client run as they are shown."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.terminal import ROOT, environment

BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.DOTALL)
PATIENCE_S = 120


def blocks(page: str, language: str) -> list[str]:
    found = BLOCK.findall((ROOT / page).read_text())
    return [code for name, code in found if name == language]


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """A folder for PATH, where `safelatent` is what these tests run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "safelatent"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m safelatent.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize(
    "code", blocks("docs/sdk.md", "python") + blocks("README.md", "python")[:1]
)
def test_python(code: str, url: str, tmp_path: Path) -> None:
    code = code.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", blocks("docs/cli.md", "console"))
def test_console(script: str, url: str, tmp_path: Path, bin: Path) -> None:
    variables = environment(url, PATH=f"{bin}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")
