"""/metrics of the frontend: what HTTP did and what waits, with labels that cannot grow."""

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from safelatent.bounded import Bounded
from safelatent.deliveries import OUTCOMES, Owed
from safelatent.forecast import Pace
from safelatent.jobs import Jobs
from safelatent.queues import PARKED_COUNTS
from service.app import create_app
from service.settings import Settings
from tests.conftest import RedisServer
from tests.service.played import CARD, result, serving, work

Labels = dict[str, str]


def samples(http: httpx.Client) -> dict[str, list[tuple[Labels, float]]]:
    """Every sample of a scrape, by its name."""
    answer = http.get("/metrics")
    assert answer.status_code == 200, answer.text
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(http: httpx.Client, name: str, **labels: str) -> float:
    """The one sample that has these labels; 0 when there is none yet."""
    seen = [v for have, v in samples(http).get(name, []) if labels.items() <= have.items()]
    assert len(seen) <= 1, (name, labels)
    return seen[0] if seen else 0.0


def test_a_request_counts_under_its_route_and_a_problem_under_its_type(http: httpx.Client) -> None:
    ok = {"method": "GET", "route": "/generations/{id}", "status": "404"}
    before = value(http, "safelatent_http_requests_total", **ok)
    refused = value(http, "safelatent_http_rejected_total", reason="not-found")
    for id in ("secret-1", "secret-2"):
        http.get(f"/generations/{id}")
    assert value(http, "safelatent_http_requests_total", **ok) == before + 2
    assert value(http, "safelatent_http_rejected_total", reason="not-found") == refused + 2
    del ok["status"]
    assert value(http, "safelatent_http_request_duration_seconds_count", **ok) >= 2
    assert value(http, "safelatent_http_requests_in_flight") == 1  # the scrape itself
    assert "secret" not in http.get("/metrics").text


def test_paths_and_methods_that_nobody_knows_are_one_label(http: httpx.Client) -> None:
    for path in ("/a", "/b", "/v1/c"):
        http.request("BREW", path)
    routes = {
        (labels["method"], labels["route"])
        for labels, _ in samples(http)["safelatent_http_requests_total"]
    }
    assert ("other", "unmatched") in routes
    assert not {"/a", "/b", "BREW"} & {each for pair in routes for each in pair}


def test_what_waits_is_read_at_the_scrape(http: httpx.Client, connection: Redis) -> None:
    before = value(http, "safelatent_generations_submitted_total", model="tiny", level="strong")
    for _ in range(3):
        http.post("/generate", json={"prompt": "a cat", "safety": {"level": "strong"}})
    queue = {"model": "tiny", "priority": "normal"}
    assert value(http, "safelatent_queue_jobs", **queue) == 3
    assert value(http, "safelatent_queue_oldest_age_seconds", **queue) > 0
    submitted = samples(http)["safelatent_generations_submitted_total"]
    assert ({"model": "tiny", "tenant": "open", "level": "strong"}, before + 3) in submitted

    Jobs(connection).announce("abc", CARD, ttl_s=60, pace=Pace(throughput=0, each=0, slots=2))
    assert value(http, "safelatent_workers", model="tiny") == 1
    assert value(http, "safelatent_slots", model="tiny") == 2

    work(connection, result)
    assert value(http, "safelatent_queue_jobs", **queue) == 0
    assert value(http, "safelatent_queue_oldest_age_seconds", **queue) == 0


def test_a_forged_job_does_not_break_the_scrape(http: httpx.Client, connection: Redis) -> None:
    here = http.post("/generate", json={"prompt": "a cat"}).headers["location"]
    connection.hset(f"rq:job:{here.rsplit('/', 1)[1]}", "created_at", "yesterday")
    assert value(http, "safelatent_queue_jobs", priority="normal") == 1


def test_webhooks_and_parked_jobs_are_counted_in_redis_for_all(
    http: httpx.Client, connection: Redis
) -> None:
    assert value(http, "safelatent_webhook_attempts_total", outcome="failed") == 0
    for outcome in ("delivered", "retried", "retried"):
        Owed(connection).count(outcome)
    connection.hset(OUTCOMES, "secret/forged", "5")
    connection.hset(PARKED_COUNTS, mapping={"2": 3, "odd": "many"})
    connection.hset(PARKED_COUNTS, mapping={str(version): 1 for version in range(100, 200)})
    assert value(http, "safelatent_webhook_attempts_total", outcome="retried") == 2
    parked = {
        labels["version"]: count
        for labels, count in samples(http)["safelatent_parked_generations_total"]
    }
    assert parked["2"] == 3 and len(parked) == 11 and sum(parked.values()) == 103
    assert "secret" not in http.get("/metrics").text


def test_without_redis_the_scrape_still_answers(own_redis: RedisServer, tmp_path: Path) -> None:
    settings = Settings(redis_url=own_redis.url, model="tiny", store_url=f"file://{tmp_path}")
    with serving(create_app(settings)) as url, httpx.Client(base_url=url, timeout=20) as http:
        assert value(http, "safelatent_redis_up") == 1
        own_redis.stop()
        seen = samples(http)
    assert seen["safelatent_redis_up"] == [({}, 0)]
    assert "safelatent_queue_jobs" not in seen
    assert "safelatent_http_requests_total" in seen


def test_with_a_policy_file_the_open_port_has_none(redis_url: str, tmp_path: Path) -> None:
    """They name tenants, and one tenant is nothing to another."""
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[tenants.a]\nkeys = [{{ id = "abcd", sha256 = "{"0" * 64}" }}]\n')
    settings = Settings(
        redis_url=redis_url, model="tiny", store_url="memory:///", policy_file=policy
    )
    with serving(create_app(settings)) as url:
        answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 404
    assert "SAFELATENT_METRICS_PORT" in answer.json()["detail"]


def test_a_label_has_a_bound() -> None:
    bounded = Bounded(2)
    assert [bounded(each) for each in ("a", "b", "c", "a", None)] == [
        "a",
        "b",
        "other",
        "a",
        "other",
    ]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_finds_nothing_wrong(http: httpx.Client) -> None:
    http.post("/generate", json={"prompt": "a cat"})
    text = http.get("/metrics").text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
