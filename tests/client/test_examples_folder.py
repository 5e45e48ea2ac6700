"""The programs of examples/ do what their first lines say."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from safelatent.store import Store
from service.app import create_app
from service.settings import Settings
from tests.client.acting import acting, png
from tests.client.terminal import ROOT, environment
from tests.service.played import serving

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


def test_the_web_pages_requests_are_allowed_and_answered(
    redis_url: str, connection: Redis, tmp_path: Path
) -> None:
    """As its browser would: each header that the page sends is asked for before."""
    page = (EXAMPLES / "page.html").read_text()
    origin = re.findall(r"SAFELATENT_CORS_ORIGINS=(\S+)", page)[0]
    sent = set(re.findall(r"Authorization|Content-Type|Idempotency-Key|Prefer", page))
    body = {"prompt": "a cat", "seed": 7, "safety": {"level": "strong"}}
    assert len(sent) == 4 and "JSON.stringify({prompt: prompt.value, safety: {level:" in page
    store = f"file://{tmp_path}"
    settings = Settings(redis_url=redis_url, model="tiny", store_url=store, cors_origins=origin)
    with (
        serving(create_app(settings)) as url,
        acting(connection, Store(store)),
        httpx.Client(base_url=url, headers={"Origin": origin}, timeout=60) as browser,
    ):

        def fetch(method: str, path: str, **options: Any) -> httpx.Response:
            asked = {
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": ", ".join(sorted(sent)).lower(),
            }
            assert browser.options(path, headers=asked).status_code == 200
            answer = browser.request(method, path, **options)
            assert answer.is_success and answer.headers["Access-Control-Allow-Origin"] == origin
            return answer

        headers = {"Prefer": "wait=30", "Idempotency-Key": "a-random-uuid"}
        generation = fetch("POST", "/generate", json=body, headers=headers).json()
        while generation["status"] in ("queued", "running"):
            path = f"/generations/{generation['id']}"
            generation = fetch("GET", path, headers={"Prefer": "wait=30"}).json()
        [image] = generation["images"]
        assert image["blocked"] is None and generation["safety"]["effective"]["applied"]
        assert fetch("GET", image["url"]).content == png(7)
        other = browser.get("/capabilities", headers={"Origin": "http://elsewhere.example"})
        assert "Access-Control-Allow-Origin" not in other.headers


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
