"""Bad input is answered by a problem that names the field, its value and what would be right."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

CUSTOM = {
    "guidance_scale": 1000,
    "warmup_steps": 10,
    "threshold": 0.01,
    "momentum_scale": 0.3,
    "mom_beta": 0.4,
}


def custom(**changed: Any) -> dict[str, Any]:
    return {"safety": {"level": "custom", "parameters": CUSTOM | changed}}


@pytest.mark.parametrize(
    ("wrong", "field", "right"),
    [
        ({"colour": "red"}, "colour", "negative_prompt"),
        ({"safety": {"levle": "max"}}, "safety.levle", "concepts"),
        ({"prompt": " \n"}, "prompt", "say what to draw"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"width": 36}, "width", "multiple of 8"),
        ({"height": 4096}, "height", "2048"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": 10**400}, "steps", "500"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "finite"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**32}, "seed", "4294967295"),
        ({"n": 9}, "n", "8"),
        ({"n": True}, "n", "a number"),
        ({"deadline_s": "5"}, "deadline_s", "a number"),
        (custom(threshold=False), "safety.parameters.threshold", "a number"),
        ({"scheduler": "magic"}, "scheduler", "'ddim'"),
        ({"model": "magic"}, "model", "tiny"),
        ({"safety": {"level": "ultra"}}, "safety.level", "'medium'"),
        ({"safety": {"level": "custom"}}, "safety.parameters", "level 'custom' needs"),
        ({"safety": {"level": "max", "parameters": CUSTOM}}, "safety.parameters", "no other takes"),
        ({"safety": {"concepts": [""]}}, "safety.concepts.0", "at least 1 character"),
        (custom(threshold=11), "safety.parameters.threshold", "less than or equal to 10"),
        (custom(guidance_scale=1), "safety.parameters.guidance_scale", "greater than 1"),
        (custom(mom_beta=float("nan")), "safety.parameters.mom_beta", "finite"),
        ({"metadata": {"a": [1], "b": 1}}, "metadata.a", "text"),
        ({"metadata": {"a": float("nan")}}, "metadata.a", "finite"),
        ({"metadata": {"a": "x" * 16_000}}, "metadata", "16000 at most"),
        ({"metadata": {"a": "\udfff"}}, "metadata", "valid Unicode"),
    ],
)
def test_a_wrong_field_is_named(
    http: httpx.Client, wrong: dict[str, Any], field: str, right: str
) -> None:
    body = json.dumps({"prompt": "a cat"} | wrong)
    problem = assert_problem(post(http, body), 422, "invalid-request")
    assert [error["field"] for error in problem["errors"]] == [field]
    assert problem["detail"].startswith(f"{field}: ")
    assert right in problem["detail"]
    assert "(got " in problem["detail"]
    assert len(json.dumps(problem["errors"][0]["value"])) < 300


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"guidance_scale": 1}, "guidance_scale above 1"),
        ({"steps": 10}, "steps above 10"),
        ({"negative_prompt": "blood", "safety": {"concepts": ["blood "]}}, "drop one of the two"),
        ({"negative_prompt": "BODILY fluids", "safety": {"concepts": ["bodily  fluids"]}}, "drop"),
        (custom(warmup_steps=50), "steps above 50"),
    ],
)
def test_a_level_that_could_not_act_is_refused(
    http: httpx.Client, wrong: dict[str, Any], right: str
) -> None:
    response = post(http, json.dumps({"prompt": "a cat"} | wrong))
    problem = assert_problem(response, 422, "safety-cannot-act")
    assert problem["errors"][0]["field"] == "safety.level"
    assert problem["errors"][0]["value"] in ("medium", "custom")
    assert right in problem["detail"]


def test_every_wrong_field_is_listed(http: httpx.Client) -> None:
    problem = post(http, '{"n": 9, "steps": 0}').json()
    assert {error["field"] for error in problem["errors"]} == {"prompt", "n", "steps"}
    assert "2 more in `errors`" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        ("", 400, "malformed-body"),
        ('{"prompt": ', 400, "malformed-body"),
        (b'{"prompt": "\xff"}', 400, "malformed-body"),
        ("[" * 100_000, 400, "malformed-body"),
        ('{"prompt": "a cat", "seed": ' + "9" * 5_000 + "}", 400, "malformed-body"),
        ('["a cat"]', 422, "invalid-request"),
        ("null", 422, "invalid-request"),
        ('{"metadata": ' + '{"a": ' * 300 + "1" + "}" * 300 + "}", 422, "invalid-request"),
        ('"' + "x" * 1024 * 1024 + '"', 413, "body-too-large"),
    ],
)
def test_a_body_that_is_no_request(
    http: httpx.Client, body: str | bytes, status: int, slug: str
) -> None:
    assert_problem(post(http, body), status, slug)


def test_an_endless_body_is_not_read_to_its_end(http: httpx.Client) -> None:
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 65_536

    try:
        response = http.post("/generate", content=chunks(), headers=JSON)
    except httpx.WriteError:  # it may hang up before we have read why
        pass
    else:
        assert_problem(response, 413, "body-too-large")
    assert sent < 1000


@pytest.mark.parametrize("media_type", ["text/plain", "multipart/form-data; boundary=x", ""])
def test_only_json_is_read(http: httpx.Client, media_type: str) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = http.post("/generate", content='{"prompt": "a cat"}', headers=headers)
    assert_problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/nothing", 404, "not-found"),
        ("GET", "/generate", 405, "method-not-allowed"),
        ("GET", "/generations/unknown", 404, "not-found"),
        ("GET", "/generations/%00%ff%3A", 404, "not-found"),
        ("GET", "/generations/unknown/images/0", 404, "not-found"),
        ("GET", "/generations/unknown/images/first", 422, "invalid-request"),
        ("POST", "/generations/unknown/cancel", 404, "not-found"),
        ("GET", "/problems/unknown", 404, "not-found"),
    ],
)
def test_a_path_that_leads_nowhere(
    http: httpx.Client, method: str, path: str, status: int, slug: str
) -> None:
    assert_problem(http.request(method, path), status, slug)


def test_every_problem_type_is_a_page_that_explains_it(http: httpx.Client) -> None:
    problem = post(http, "{}").json()
    page = http.get(problem["type"]).raise_for_status().json()
    assert page["title"] == problem["title"]
    assert page["explanation"] == "A field has a value that cannot be."
    assert page["cause"].startswith("A field is wrong") and "`errors`" in page["cure"]


TEXT = st.text(max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = ["n", "seed", "width", "steps", "model", "metadata", "scheduler", "deadline_s"]
SAFETY = st.dictionaries(st.sampled_from(["level", "concepts", "parameters", "checks"]), ANYTHING)
REQUESTS = st.fixed_dictionaries(
    {"prompt": TEXT}, optional={name: ANYTHING for name in NAMES} | {"safety": SAFETY | ANYTHING}
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=REQUESTS | ANYTHING, prefer=st.sampled_from(["", "wait", "wait=x", "wait=-1", 'w="']))
@example(body={"prompt": "\0"}, prefer="wait=0")
@example(body={"prompt": "a cat", "metadata": {"\ud800": "\udfff"}}, prefer="")
def test_no_body_is_a_defect(http: httpx.Client, body: Any, prefer: str) -> None:
    response = http.post(
        "/generate", content=json.dumps(body), headers=JSON | {"Prefer": prefer} if prefer else JSON
    )
    if response.status_code != 202:
        assert 400 <= response.status_code < 500
        assert_problem(response, response.status_code)


JSON = {"Content-Type": "application/json"}


def post(http: httpx.Client, body: str | bytes) -> httpx.Response:
    return http.post("/generate", content=body, headers=JSON)


def assert_problem(response: httpx.Response, status: int, slug: str = "") -> dict[str, Any]:
    """It is a problem of RFC 9457, in JSON without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = json.loads(response.text, parse_constant=refuse)
    assert problem["status"] == status
    assert problem["type"].startswith(f"/problems/{slug}")
    return problem
