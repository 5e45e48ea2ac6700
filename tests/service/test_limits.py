"""Rates and bounds: who is told to wait, for how long, and what it costs to be refused."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis import Redis

from safelatent import errors
from safelatent.forecast import Pace
from safelatent.jobs import Jobs
from safelatent.queues import queues
from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, result, serving, work
from tests.service.test_forms import ask

CAT = {"prompt": "a cat", "steps": 50}
"""64 x 32 pixels x 50 steps are 0.1 megapixel-steps."""
RIGHTS = {
    "fast": "requests_per_minute = 3",
    "rated": "requests_per_minute = 6\nmegapixel_steps_per_minute = 1",
    "large": "megapixel_steps_per_minute = 1",
    "full": "max_queued = 2\nweight = 2.5\nmax_running = 4",
    "free": "",
}


class Frontends:
    """Two frontends on one Redis and one policy, and each tenant's key."""

    def __init__(self, urls: list[str], keys: dict[str, str], connection: Redis):
        self.urls = urls
        self.keys = keys
        self.connection = connection

    def ask(self, tenant: str, frontend: int = 0, **changed: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}", **changed.pop("headers", {})}
        url = f"{self.urls[frontend]}/generate"
        return httpx.post(url, json=CAT | changed, headers=headers, timeout=20)

    def queued(self) -> int:
        return sum(len(queue.job_ids) for queue in queues("tiny", self.connection))

    def announce(self, *paces: Pace) -> None:
        for i, pace in enumerate(paces):
            Jobs(self.connection).announce(f"w{i}", CARD, 60, pace)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A policy file, and each tenant's key."""
    keys, policy = {}, ""
    for tenant, rights in RIGHTS.items():
        command = [sys.executable, "-m", "safelatent.cli", "key", "new", "--tenant", tenant]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        keys[tenant] = made.stdout.strip()
        policy += f"{made.stderr}{rights}\n"
    file = tmp_path_factory.mktemp("policy") / "policy.toml"
    file.write_text(policy)
    return file, keys


@pytest.fixture
def frontends(
    redis_url: str, connection: Redis, tmp_path: Path, tenants: tuple[Path, dict[str, str]]
) -> Iterator[Frontends]:
    file, keys = tenants
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    with ExitStack() as stack:
        urls = []
        for _ in range(2):
            settings = Settings(
                redis_url=redis_url,
                model="tiny",
                store_url=f"file://{tmp_path}",
                policy_file=file,
                max_queued=20,
            )
            urls.append(stack.enter_context(serving(create_app(settings))))
        yield Frontends(urls, keys, connection)


def test_a_rate_holds_over_all_frontends_and_is_told_in_headers(frontends: Frontends) -> None:
    answers = [frontends.ask("fast", i % 2) for i in range(5)]
    assert [answer.status_code for answer in answers] == [202, 202, 202, 429, 429]
    assert [answer.headers["ratelimit-policy"] for answer in answers] == ['"requests";q=3;w=60'] * 5
    states = [answer.headers["ratelimit"] for answer in answers]
    left = [int(re.fullmatch(r'"requests";r=(\d+);t=(\d+)', state)[1]) for state in states]  # type: ignore[index]
    assert left == [2, 1, 0, 0, 0]
    refused = answers[3]
    assert refused.json()["type"] == "/problems/rate-limited"
    assert "3 requests a minute" in refused.json()["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert frontends.queued() == 3
    assert frontends.ask("free").status_code == 202  # others are not meant
    assert "ratelimit" not in frontends.ask("free").headers


def test_what_is_refused_by_one_rate_is_not_charged_to_another(frontends: Frontends) -> None:
    assert frontends.ask("rated", n=8).status_code == 202  # 0.8 of 1 megapixel-steps
    refused = frontends.ask("rated", n=8)
    assert refused.status_code == 429
    policies = '"requests";q=6;w=60, "megapixel-steps";q=1;w=60'
    assert refused.headers["ratelimit-policy"] == policies
    state = refused.headers["ratelimit"]
    assert state.startswith('"requests";r=5;t=10, "megapixel-steps";r=0;t=')
    assert 30 <= int(refused.headers["retry-after"]) <= 39
    assert frontends.ask("rated").status_code == 202


def test_more_than_a_minutes_quota_is_never_allowed_and_says_so(frontends: Frontends) -> None:
    answer = frontends.ask("large", n=8, width=64, height=64)
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")
    assert "1.64" in answer.json()["detail"]
    assert "retry-after" not in answer.headers


def test_a_quota_comes_back_with_time(frontends: Frontends) -> None:
    for _ in range(3):
        frontends.ask("fast")
    assert frontends.ask("fast").status_code == 429
    [key] = frontends.connection.keys("safelatent:rate:fast:*")
    whole_at = float(frontends.connection.get(key))  # type: ignore[arg-type]
    frontends.connection.set(key, whole_at - 20)  # twenty seconds later
    assert frontends.ask("fast").status_code == 202
    assert frontends.ask("fast").status_code == 429


def test_an_idempotent_repeat_costs_nothing_and_a_refused_key_is_free(frontends: Frontends) -> None:
    first = [frontends.ask("fast", headers={"Idempotency-Key": "a"}) for _ in range(6)]
    assert {answer.status_code for answer in first} == {202}
    assert len({answer.json()["id"] for answer in first}) == 1
    for _ in range(2):
        frontends.ask("fast")
    for _ in range(2):  # the second is no 409: nothing is being accepted under that key
        assert frontends.ask("fast", headers={"Idempotency-Key": "b"}).status_code == 429


def test_so_many_wait_and_no_more(frontends: Frontends) -> None:
    """The wait is told by the tenant's share of the measured throughput."""
    frontends.announce(Pace(0.01, 0.005, 0), Pace(0.01, 0.005, 0))
    assert [frontends.ask("full", i % 2).status_code for i in range(3)] == [202, 202, 429]
    time.sleep(0.6)  # a newer picture of the queue
    refused = frontends.ask("full")
    assert refused.json()["type"] == "/problems/too-many-queued"
    assert refused.headers["retry-after"] == "6"  # 0.1024 at 0.02, alone in the queue
    frontends.ask("free")
    time.sleep(0.6)
    assert frontends.ask("full").headers["retry-after"] == "8"  # 2.5 of 3.5
    work(frontends.connection, result)
    assert frontends.ask("full").status_code == 202


def test_a_full_queue_takes_no_more_of_anyone(frontends: Frontends) -> None:
    for _ in range(20):
        assert frontends.ask("free").status_code == 202
    refused = frontends.ask("fast")
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/queue-full")
    assert refused.headers["retry-after"] == "5"  # nothing was measured
    assert frontends.queued() == 20
    assert not frontends.connection.keys("safelatent:rate:*")  # and nothing is charged


def test_openais_clients_understand(frontends: Frontends) -> None:
    for _ in range(3):
        frontends.ask("fast")
    client = openai.OpenAI(
        base_url=f"{frontends.urls[0]}/v1", api_key=frontends.keys["fast"], max_retries=0
    )
    with client, pytest.raises(openai.RateLimitError) as raised:
        client.images.generate(prompt="a cat")
    assert raised.value.code == "rate_limit_exceeded"
    assert raised.value.type == "rate_limit_error"
    headers = raised.value.response.headers
    assert int(headers["retry-after"]) > 0
    assert headers["ratelimit"].startswith('"requests";r=0')


def test_the_tenant_can_read_its_limits(frontends: Frontends) -> None:
    headers = {"Authorization": f"Bearer {frontends.keys['full']}"}
    limits = httpx.get(f"{frontends.urls[0]}/capabilities", headers=headers).json()["limits"]
    assert limits["weight"] == 2.5
    assert (limits["max_running"], limits["max_queued"]) == (4, 2)
    assert limits["requests_per_minute"] is limits["megapixel_steps_per_minute"] is None


def test_who_waits_for_an_image_that_comes_too_late_gets_504(
    http: httpx.Client, connection: Redis
) -> None:
    """The worker drops what has passed its deadline_s (tests/worker/test_tasks.py)."""
    late = errors.DeadlineExceeded("it waited 9 s, and its deadline_s is 1").problem

    def too_late(version: int, request: dict[str, Any]) -> dict[str, Any]:
        return result(version, request, status="failed", images=[], error=late)

    answer = ask(http, connection, too_late, "image/png", deadline_s=1)
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/deadline-exceeded")
