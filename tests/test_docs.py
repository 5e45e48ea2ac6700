"""What the docs show is so: their commands run, and the answers have the keys that are shown."""

import inspect
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import get_current_job

from safelatent import errors
from safelatent.jobs import Jobs
from safelatent.schema import GenerationRequest, Safety, SafetyEffective, TelemetrySummary
from safelatent.store import Store
from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, result, serving, work

ROOT = Path(__file__).parents[1]
URL = "http://127.0.0.1:8000"
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MODEL = "emoji_scenes"
SUMMARY = TelemetrySummary(
    applied_calls=40, calls=50, cosine=0, undone=0, active=0, momentum=0, peak_call=11
)


@dataclass
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None
    shown: Any = None
    """The JSON block that follows a command."""

    def commands(self) -> str:
        """All of a `sh` block; of a `console` one only what calls the service."""
        if self.language == "sh":
            return self.text
        joined = self.text.replace("\\\n", "\\\0").splitlines()
        return "\n".join(line for line in joined if line.startswith("curl")).replace("\0", "\n")


def blocks(page: str) -> list[Block]:
    content = (ROOT / page).read_text()
    found: list[Block] = []
    for fence in FENCE.finditer(content):
        line = content[: fence.start()].count("\n") + 1
        block = Block(page, line, fence["language"], fence["text"], fence["why"])
        if block.language == "json" and found:
            found[-1].shown = json.loads(block.text)
        found.append(block)
    return found


PAGES = ["README.md", "docs/api.md", "docs/deployment.md", "docs/openai.md"]
PYTHON = [
    block
    for page in PAGES
    for block in blocks(page)
    if block.language == "python" and block.why_not is None
]


@pytest.fixture
def address(redis_url: str, connection: Redis, tmp_path: Path) -> Iterator[str]:
    """A service whose worker takes a moment for everything that is queued."""
    picture = (ROOT / "docs" / "levels.png").read_bytes()
    store_url = f"file://{tmp_path}/store"
    app = create_app(Settings(redis_url=redis_url, model=MODEL, store_url=store_url))
    app.state.parts.waiting.look_every_s = 0.2
    card = CARD.model_copy(update={"id": MODEL})
    Jobs(connection).announce("played", card, ttl_s=3600)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        id = get_current_job().id  # type: ignore[union-attr]
        time.sleep(0.2)
        for index in range(request["n"]):
            Store(store_url).put(f"{id}/{index}.{request['image_format']}", picture)
        asked = GenerationRequest.model_validate(request).safety
        effective = SafetyEffective(
            level=asked.level,
            parameters=asked.effective_parameters(),
            concepts=asked.concepts,
            applied=True,
            prediction_type="epsilon",
            model_revision="r1",
        )
        done = result(version, request, safety=Safety(requested=asked, effective=effective))
        for image in done["images"]:
            image["safety"]["summary"] = SUMMARY.model_dump()
        return done

    stop = threading.Event()

    def play() -> None:
        while not stop.wait(0.1):
            work(connection, generate, MODEL)

    thread = threading.Thread(target=play)
    with serving(app) as url:
        thread.start()
        yield url
        stop.set()
        thread.join()


def last_json(said: str) -> Any:
    """What the last of several commands has answered; none of them ends its line."""
    while said.strip():
        found, end = json.JSONDecoder().raw_decode(said.lstrip())
        said = said.lstrip()[end:]
    return found


def has_keys(answer: Any, shown: Any, where: str = "") -> None:
    """Every key that a page shows is in the answer."""
    if isinstance(shown, dict):
        for key, value in shown.items():
            assert key in (answer or ()), f"{where}: {key} is not in the answer"
            has_keys(answer[key], value, f"{where}.{key}")
    elif isinstance(shown, list) and shown:
        has_keys(answer[0], shown[0], f"{where}[0]")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("page", PAGES)
def test_its_commands_run_and_its_answers_have_these_keys(
    page: str, address: str, tmp_path: Path
) -> None:
    script = ["set -euo pipefail"]
    commands = [b for b in blocks(page) if b.language in ("sh", "console") and b.commands()]
    commands = [block for block in commands if block.why_not is None]
    for number, block in enumerate(commands):
        script.append(f"exec > {number}.out\n{block.commands()}")
    done = subprocess.run(
        ["bash", "-c", "\n".join(script).replace(URL, address)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for number, block in enumerate(commands):
        said = (tmp_path / f"{number}.out").read_text()
        if block.shown is not None:
            where = f"{page}:{block.line}"
            has_keys(last_json(said), block.shown, where)
    if page == "docs/api.md":
        assert len(commands) > 10
        for picture in ("cat.png", "1.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        ids = {json.loads((tmp_path / f"{n}.json").read_text())["id"] for n in (1, 2)}
        assert len(ids) == 1
        events = next(n for n, block in enumerate(commands) if "/events" in block.text)
        assert "event: finished" in (tmp_path / f"{events}.out").read_text()


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_its_python_runs(
    block: Block, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text.replace(URL, address), block.page, "exec"), {})


def test_its_table_of_errors_is_the_tree() -> None:
    rows = ["| type | status | meaning |", "|---|---|---|"]
    for slug, cls in errors.ERRORS.items():
        if cls in (errors.SafelatentError, errors.NoAnswer, errors.BadSignature):
            continue  # the root, and what the service never answers
        in_generation = issubclass(cls, errors.JobError) and cls.status == 500
        meaning = " ".join((inspect.getdoc(cls) or "").split())
        rows.append(f"| `{slug}` | {'' if in_generation else cls.status} | {meaning} |")
    table = "\n".join(rows)
    content = (ROOT / "docs" / "api.md").read_text()
    shown = content.split("<!-- errors -->\n")[1].split("\n<!-- /errors -->")[0]
    assert shown == table, f"the table in docs/api.md should be:\n{table}"


def test_a_key_that_an_answer_lacks_is_seen() -> None:
    has_keys({"a": [{"b": 1}]}, {"a": [{"b": 2}]})
    with pytest.raises(AssertionError, match=r"x.a\[0\]: c is not in"):
        has_keys({"a": [{"b": 1}]}, {"a": [{"c": 2}]}, "x")
