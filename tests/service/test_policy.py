"""A policy may only tighten, and nobody gets past it."""

import hashlib
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from safelatent import errors
from safelatent.safety import CONCEPT, LEVELS
from safelatent.schema import GenerationRequest
from service.app import create_app
from service.auth import Callers
from service.policy import Tenant, UnusablePolicy, load, tighten
from service.settings import Settings
from tests.service.played import CARD, serving

ALICE, BOB, OLD, PAST = "slk_alice", "slk_bob", "slk_old", "slk_past"


def policy_text() -> str:
    keys = (ALICE, BOB, OLD, PAST)
    alice, bob, old, past = (hashlib.sha256(key.encode()).hexdigest() for key in keys)
    return f"""
        name = "test"
        [tenants.alice]
        keys = [
            {{ id = "alice", sha256 = "{alice}" }},
            {{ id = "gone", sha256 = "{old}", revoked = true }},
            {{ id = "past", sha256 = "{past}", expires = 2020-01-01 }},
        ]
        [tenants.bob]
        keys = [{{ id = "bobby", sha256 = "{bob}" }}]
        floor = "strong"
        max_steps = 60
    """


def passed(tenant: Tenant, **fields: Any) -> tuple[GenerationRequest, list[str]]:
    request = GenerationRequest(prompt="a cat", model="tiny", width=64, height=64, **fields)
    request, applied = tighten(request, tenant, "test", "0" * 64)
    return request, applied.raised


def custom(**changed: float) -> dict[str, Any]:
    numbers = LEVELS["strong"].model_dump() | changed
    return {"level": "custom", "parameters": numbers}


@pytest.mark.parametrize(
    ("safety", "field"),
    [
        ({"level": "off"}, "safety.level"),
        ({"level": "medium"}, "safety.level"),
        (custom(warmup_steps=8), "safety.level"),
        (custom(guidance_scale=1999), "safety.level"),
        (custom(threshold=0.02), "safety.level"),
        (custom(momentum_scale=0.4), "safety.level"),
        (custom(mom_beta=0.6), "safety.level"),
        (custom(mom_beta=1), "safety.level"),
        ({"level": "max", "concepts": ["smoke"]}, "safety.concepts"),
        ({"level": "max", "concepts": [CONCEPT, "smoke"]}, "safety.concepts"),
        ({"level": "max", "checks": "report"}, "safety.checks"),
    ],
)
def test_what_is_below_the_floor_is_refused_or_lifted_as_the_tenant_chose(
    safety: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.Forbidden) as refused:
        passed(Tenant(floor="strong"), safety=safety)
    assert field in [each.field for each in refused.value.problem.errors]

    lifted, raised = passed(Tenant(floor="strong", below_floor="raise"), safety=safety)
    assert field in raised
    assert lifted.safety.level in ("strong", "max")
    assert lifted.safety.concepts == [CONCEPT] and lifted.safety.checks == "block"


def test_what_keeps_to_the_floor_passes_unchanged() -> None:
    for safety in ({"level": "strong"}, {"level": "max"}, custom(warmup_steps=0)):
        request, raised = passed(Tenant(floor="strong"), safety=safety)
        assert not raised and request.safety.level == safety["level"]


def test_a_lifted_request_that_could_not_act_is_refused() -> None:
    with pytest.raises(errors.SafetyCannotAct, match="warm-up"):
        passed(Tenant(floor="medium", below_floor="raise"), steps=5, safety={"level": "off"})


@pytest.mark.parametrize("below_floor", ["refuse", "raise"])
def test_few_steps_are_no_way_around_a_floor(below_floor: Any) -> None:
    """The warm-up of `medium` is 10 calls: of 19 it would leave no half to be guided."""
    tenant = Tenant(floor="medium", below_floor=below_floor)
    with pytest.raises(errors.Forbidden, match="steps is 19.*more steps") as refused:
        passed(tenant, steps=19)
    assert [each.field for each in refused.value.problem.errors] == ["steps"]
    passed(tenant, steps=20)
    passed(tenant, steps=11, scheduler="heun")
    passed(tenant, steps=1, safety={"level": "max"})
    with pytest.raises(errors.Forbidden):
        passed(tenant, steps=19, safety={"level": "off"})
    passed(Tenant(), steps=11)


@pytest.mark.parametrize(
    ("rights", "fields", "field"),
    [
        ({"max_images": 2}, {"n": 3}, "n"),
        ({"max_steps": 20}, {"steps": 21}, "steps"),
        ({"max_pixels": 64 * 63}, {}, "width"),
        ({"priorities": ["low"]}, {"priority": "high"}, "priority"),
        ({"models": ["other"]}, {}, "model"),
        ({"ceiling": "medium"}, {"safety": {"level": "max"}}, "safety.level"),
        ({"ceiling": "medium"}, {"safety": custom()}, "safety.level"),
        ({"ceiling": "off"}, {"safety": custom(guidance_scale=2)}, "safety.level"),
    ],
)
def test_what_exceeds_a_tenants_rights_is_refused_by_name(
    rights: dict[str, Any], fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.Forbidden) as refused:
        passed(Tenant(**rights), **fields)
    assert [each.field for each in refused.value.problem.errors] == [field]


def test_a_key_opens_its_own_tenant_and_no_other(
    redis_url: str, connection: Redis, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text(policy_text())
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    app = create_app(
        Settings(
            redis_url=redis_url,
            model="tiny",
            store_url=f"file://{tmp_path}",
            policy_file=tmp_path / "policy.toml",
        )
    )
    with serving(app) as url, httpx.Client(base_url=url) as http:

        def call(method: str, path: str, key: str | None, **body: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return http.request(method, path, headers=headers, json=body or None)

        made = call("POST", "/generate", ALICE, prompt="a cat")
        assert made.status_code == 202 and made.json()["policy"]["name"] == "test"
        own = made.json()["links"]["self"]
        assert call("GET", own, ALICE).status_code == 200
        assert call("GET", own, BOB).status_code == 404
        assert call("POST", f"{own}/cancel", BOB).status_code == 404
        for key in (None, "slk_unknown", OLD, PAST, "x" * 10_000):
            refused = call("GET", own, key)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert call("POST", "/generate", BOB, prompt="a cat").status_code == 403


def test_a_changed_file_is_in_force_at_once_and_a_broken_one_changes_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text())
    callers = Callers(path)
    path.write_text(policy_text().replace("[tenants.bob]", "[tenants.carol]"))
    os.utime(path, ns=(1, 1))
    assert callers.caller(f"Bearer {BOB}").tenant == "carol"
    path.write_text("tenants = 3")
    assert callers.caller(f"Bearer {BOB}").tenant == "carol"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = \nb = 1", "line 1"),
        ("[tenants.a]\nfloor = 'medum'", "tenants.a.floor"),
        ("[tenants.a]\nflor = 'max'", "tenants.a.flor"),
        ("[tenants.a]\nconcepts = []", "tenants.a.concepts"),
        ("[tenants.a]\nfloor = 'max'\nceiling = 'weak'", "above the ceiling"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_or_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(UnusablePolicy, match=said):
        load(path)


def test_a_key_in_the_place_of_its_hash_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[tenants.a]\nkeys = [{ id = "abcd", sha256 = "slk_canary" }]')
    with pytest.raises(UnusablePolicy, match="tenants.a.keys.0.sha256") as refused:
        load(path)
    assert "canary" not in str(refused.value)


def test_a_size_given_by_half_is_limited_before_a_worker_has_told_the_other() -> None:
    request = GenerationRequest(prompt="a cat", model="tiny", width=2048)
    with pytest.raises(errors.Forbidden, match="width x height"):
        tighten(request, Tenant(max_pixels=512 * 512), "test", "0" * 64)


def test_an_open_service_stays_on_loopback() -> None:
    with pytest.raises(ValueError, match="safelatent key new"):
        Settings(redis_url="unix:///x", host="0.0.0.0")
    assert Settings(redis_url="unix:///x", host="0.0.0.0", open=True)
