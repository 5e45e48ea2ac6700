"""What a caller may choose, and what is said when the service refuses, with the real service."""

import hashlib
from collections.abc import Iterator

import pytest
from redis import Redis

from playground.plot import Line, plot
from playground.render import results
from playground.settings import Settings
from playground.talk import Side, Talk
from playground.words import said
from safelatent import errors
from safelatent.client import Client
from safelatent.schema import Problem
from service.app import create_app
from service.settings import Settings as ServiceSettings
from tests.service.played import CARD, serving

BODY = {"prompt": "a cat", "seed": 1, "steps": 25, "safety": {"level": "medium"}}


@pytest.fixture(scope="module")
def url(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service whose one tenant has the floor `medium`."""
    folder = tmp_path_factory.mktemp("policy")
    digest = hashlib.sha256(b"slk_right").hexdigest()
    (folder / "policy.toml").write_text(
        f"""[tenants.acme]
        keys = [{{ id = "k3f9", sha256 = "{digest}" }}]
        floor = "medium"
        max_steps = 30"""
    )
    settings = ServiceSettings(
        redis_url=redis_url,
        model="tiny",
        store_url=f"file://{folder}",
        policy_file=folder / "policy.toml",
    )
    with serving(create_app(settings)) as url:
        yield url


@pytest.fixture
def talk(url: str, connection: Redis) -> Iterator[Talk]:
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    with Client(url, api_key="slk_right") as client:
        yield Talk(client)


def refused(talk: Talk, **changed: object) -> errors.SafelatentError:
    """The error of a request that never becomes a generation."""
    sides: list[Side] = []
    for sides in talk.compare([BODY | changed]):  # noqa: B007
        pass
    assert sides[0].error is not None and sides[0].generation is None
    return sides[0].error


def test_only_what_the_tenant_may_use_is_offered(talk):
    choices = talk.choices()
    assert choices.levels == ["medium", "strong", "max"]
    assert choices.can.concepts_fixed and choices.can.limits["steps"] == 30
    assert [model.id for model in choices.models] == ["tiny"]


def test_below_the_floor_the_policy_is_named(talk):
    words = said(refused(talk, safety={"level": "off"}), "http://x", True)
    assert words.title == "Your policy does not allow this"
    assert "medium" in words.text


def test_a_wrong_field_is_called_what_the_page_calls_it(talk):
    words = said(refused(talk, steps=0, guidance_scale=-1), "http://x", True)
    assert [item.split(":")[0] for item in words.items] == ["Steps", "Guidance"]


def test_a_level_that_could_not_act_says_why(talk):
    words = said(refused(talk, steps=5), "http://x", True)
    assert "warm-up of 10 covers all 5 denoiser calls" in words.items[0]


def test_of_two_the_one_that_is_refused_is_said_beside_the_other(talk):
    bodies = [BODY | {"safety": {"level": level}} for level in ("off", "weak")]
    *_, sides = talk.compare([bodies[0], bodies[1] | {"steps": 0}])
    shown = results(sides, "http://x", "http://x", True)
    assert shown.count('role="alert"') == 2
    assert "Your policy does not allow this" in shown and "<li>Steps: " in shown
    *_, sides = talk.compare(bodies[:1] * 2)
    assert results(sides, "http://x", "http://x", True).count('role="alert"') == 1


@pytest.mark.parametrize("key", [None, "slk_wrong"])
def test_without_a_valid_key_it_is_said_where_a_key_goes(url, key):
    with Client(url, api_key=key) as client, pytest.raises(errors.Unauthorized) as caught:
        Talk(client).choices()
    words = said(caught.value, url, key is not None)
    assert words.title == "An API key is needed" and "SAFELATENT_API_KEY" in words.cure
    assert ("does not take" in words.text) == (key is not None)


def test_too_many_requests_says_when_to_come_back():
    problem = Problem(type="/problems/x", title="Slow down", status=429, detail="60 a minute")
    error = errors.RequestError(problem=problem, retry_after_s=12)
    assert said(error, "http://x", True).cure == "Try again in 12 s."


def test_every_error_of_the_tree_has_words():
    for cls in errors.ERRORS.values():
        words = said(cls("why"), "http://x", True)
        assert words.title and (words.text or words.items or words.cure)


def test_a_plot_says_its_line_in_words_and_shades_the_warm_up():
    svg = plot("Cosine", [Line("b", "strong", range(5), [0, 0.1, 0.4, 0.3, 0.2], 2)], 5)
    assert "highest 0.40 at call 2, 0.20 at call 4; warm-up until call 2." in svg
    assert '<rect class="warmup b" x="40" y="12" width="135.0"' in svg  # 2 of 4 intervals of 270


def test_others_reach_the_page_only_where_that_is_meant(monkeypatch):
    monkeypatch.setenv("SAFELATENT_PLAYGROUND_HOST", "0.0.0.0")
    with pytest.raises(ValueError, match="your API key: set SAFELATENT_PLAYGROUND_OPEN=1"):
        Settings()
    monkeypatch.setenv("SAFELATENT_PLAYGROUND_OPEN", "1")
    monkeypatch.setenv("SAFELATENT_API_KEY", "")
    assert Settings().api_key is None
