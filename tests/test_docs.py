"""What the docs show is so: every block of code is run or says why not, and answers are as shown.

A comment before a block says what becomes of it: `<!-- not run: why -->`, `<!-- only curl is run:
why -->`, or `<!-- run by tests/... -->`. `python -m tests.test_docs` counts.
"""

import base64
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from redis import Redis
from rq import get_current_job

from safelatent import errors
from safelatent.jobs import Jobs
from safelatent.schema import GenerationRequest, Safety, SafetyEffective, TelemetrySummary
from safelatent.store import Store, image_key
from service import policy
from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, SHA256, result, serving, work

ROOT = Path(__file__).parents[1]
URL = "http://127.0.0.1:8000"
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|only curl is run|run by) ?:? ?(?P<why>.+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
MODEL = "emoji_scenes"
SECRET = "whsec_" + base64.b64encode(bytes(32)).decode()
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
    mark: str | None
    why: str | None
    shown: Any = None
    """The JSON block that follows a command."""

    @property
    def is_run_here(self) -> bool:
        return self.mark in (None, "only curl is run") and self.page not in RUN_ELSEWHERE

    def commands(self) -> str:
        """All of a `sh` block; of a `console` one only what calls the service."""
        if self.language == "sh":
            return self.text
        joined = self.text.replace("\\\n", "\\\0").splitlines()
        return "\n".join(line for line in joined if line.startswith("curl")).replace("\0", "\n")

    def fate(self) -> str:
        """run, shown (compared with an answer), or not run; raises where nobody has decided."""
        if self.mark == "not run":
            return "not run"
        if self.mark == "run by" or self.page in RUN_ELSEWHERE:
            test = self.why if self.mark else RUN_ELSEWHERE[self.page]
            source = (ROOT / str(test)).read_text()
            assert Path(self.page).name in source, f"{test} does not run {self.where}"
            return "run"
        if self.language == "json":
            return "shown"
        only_calls = all(line in self.commands() for line in self.text.splitlines())
        if self.language == "console" and self.mark is None and not only_calls:
            raise AssertionError(f"{self.where}: only curl is run; say why the rest is not")
        if self.language in ("sh", "console", "python", "toml", "yaml"):
            return "run"
        raise AssertionError(f"{self.where}: nothing runs {self.language}; say why it is not run")

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    content = (ROOT / page).read_text()
    found: list[Block] = []
    for fence in FENCE.finditer(content):
        line = content.count("\n", 0, fence.start("language")) + 1
        text = textwrap.dedent(fence["text"])
        if fence["language"] == "text":
            continue  # a drawing
        block = Block(page, line, fence["language"], text, fence["mark"], fence["why"])
        if block.language == "json" and block.is_run_here:
            assert found, f"{block.where}: no command comes before this answer"
            found[-1].shown = json.loads(block.text)
        found.append(block)
    return found


RUN_ELSEWHERE = {
    page: "tests/client/test_docs_sdk.py"
    for page in ("docs/sdk.md", "docs/cli.md")
    if (ROOT / page).exists()
}
"""Pages whose blocks another test runs."""
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
HERE = [block for block in BLOCKS if block.is_run_here]


@pytest.fixture
def address(redis_url: str, connection: Redis, tmp_path: Path) -> Iterator[str]:
    """A service whose worker takes a moment for everything that is queued."""
    picture = (ROOT / "docs" / "levels.png").read_bytes()
    store_url = f"file://{tmp_path}/store"
    settings = Settings(
        redis_url=redis_url, model=MODEL, store_url=store_url, webhook_secret=SecretStr(SECRET)
    )
    app = create_app(settings)
    app.state.parts.waiting.look_every_s = 0.2
    card = CARD.model_copy(update={"id": MODEL})
    Jobs(connection).announce("played", card, ttl_s=3600)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        id = get_current_job().id  # type: ignore[union-attr]
        time.sleep(0.2)
        for index in range(request["n"]):
            Store(store_url).put(image_key(id, index, SHA256, request["image_format"]), picture)
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
@pytest.mark.parametrize("page", sorted({b.page for b in HERE if b.language in ("sh", "console")}))
def test_its_commands_run_and_its_answers_have_these_keys(
    page: str, address: str, tmp_path: Path
) -> None:
    script = ["set -euo pipefail"]
    commands = [b for b in HERE if b.page == page and b.language in ("sh", "console")]
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
            has_keys(last_json(said), block.shown, block.where)
    if page == "docs/api.md":
        assert len(commands) > 10
        for picture in ("cat.png", "1.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        ids = {json.loads((tmp_path / f"{n}.json").read_text())["id"] for n in (1, 2)}
        assert len(ids) == 1
        events = next(n for n, block in enumerate(commands) if "/events" in block.text)
        assert "event: finished" in (tmp_path / f"{events}.out").read_text()


@pytest.mark.parametrize(
    "block", [b for b in HERE if b.language == "python"], ids=lambda block: block.where
)
def test_its_python_runs(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In a process of its own: an example may add to the tables of the process."""
    code = block.text
    if URL in code:
        code = code.replace(URL, request.getfixturevalue("address"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SAFELATENT_WEBHOOK_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "block", [b for b in HERE if b.language == "toml"], ids=lambda block: block.where
)
def test_its_toml_is_a_policy(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("SAFELATENT_WEBHOOK_SECRET", SECRET)
    (tmp_path / "acme-old").write_text(SECRET)
    path = tmp_path / "policy.toml"
    path.write_text(block.text.replace("/run/secrets", str(tmp_path)))
    parsed, _ = policy.load(path)
    assert parsed.tenants


@pytest.mark.parametrize(
    "block", [b for b in HERE if b.language == "yaml"], ids=lambda block: block.where
)
def test_its_yaml_adds_to_the_compose_file(block: Block) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for name, service in yaml.safe_load(block.text)["services"].items():
        assert service.keys() <= compose["services"][name].keys() | {"volumes"}, name


def census() -> dict[str, int]:
    """How many blocks of all pages are run, shown and not run."""
    return dict(Counter(block.fate() for block in BLOCKS))


def test_every_block_is_run_or_says_why_not() -> None:
    counted = census()
    assert counted["run"] > 2 * counted["not run"], counted


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


if __name__ == "__main__":
    counted = census()
    share = counted["run"] / (counted["run"] + counted.get("not run", 0))
    print(f"{len(PAGES)} pages: {counted}; {share:.0%} of the blocks that can be run are run")
    for block in BLOCKS:
        if block.mark == "not run":
            print(f"  {block.where}: {block.why}")
