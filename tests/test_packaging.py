"""What users install: the SDK and nothing else."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"safelatent", "httpx", "pydantic"}
THEIRS = {
    *("annotated-types", "anyio", "certifi", "h11", "httpcore", "idna", "pydantic_core"),
    *("sniffio", "typing_extensions", "typing-inspection"),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", folder], cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_only_safelatent(wheel: Path) -> None:
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"safelatent"}


def test_a_clean_environment_gets_pydantic_and_httpx_and_nothing_more(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path, with_pip=False)
    bin = tmp_path / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin / "python", "--disable-pip-version-check"]
    install = [*pip, "install", "-q", wheel, "-c", ROOT / "constraints.txt"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if "connection" in installed.stderr.lower() and installed.returncode:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True)
    names = {line.split("==")[0] for line in listed.stdout.split()}
    assert OURS <= names <= OURS | THEIRS

    def run(*command: str | Path) -> tuple[int, str, str]:
        # Nothing of the environment, which may name this tree in PYTHONPATH.
        done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert run(bin / "python", "-c", "import safelatent; safelatent.Client().close()")[0] == 0
    for folder in ("service", "worker"):
        assert run(bin / "python", "-c", f"import {folder}")[0] == 1
    code, out, err = run(bin / "safelatent", "models")
    assert (code, out) == (2, "") and "pip install 'safelatent[cli]'" in err
    code, out, err = run(bin / "safelatent", "key", "new")
    assert code == 0 and out.startswith("slk_") and "sha256" in err
