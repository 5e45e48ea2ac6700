"""The rules of the SDK: its public names, its levels, its error tree, and what it imports."""

import subprocess
import sys

import pytest

import safelatent
from safelatent import errors
from safelatent.defaults import model_id
from safelatent.schema import FieldError, Problem


def test_the_sdk_needs_pydantic_and_httpx_only() -> None:
    program = (
        "import sys, safelatent; print(*sorted({name.split('.')[0] for name in sys.modules} & "
        "{'redis', 'rq', 'obstore', 'fastapi', 'starlette', 'pydantic_settings', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_levels_are_the_papers() -> None:
    """Warm-up, guidance scale, threshold, momentum scale, momentum beta."""
    numbers = {
        name: (p.warmup_steps, p.guidance_scale, p.threshold, p.momentum_scale, p.mom_beta)
        for name, p in safelatent.LEVELS.items()
    }
    assert numbers == {
        "weak": (15, 200, 0.0, 0.0, 0.0),
        "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7),
        "max": (0, 5000, 1.0, 0.5, 0.7),
    }
    assert not safelatent.CONCEPT.startswith("an image showing")


@pytest.mark.parametrize("cls", errors.ERRORS.values(), ids=errors.ERRORS)
def test_an_error_crosses_the_wire_as_its_own_class(cls: type[errors.SafelatentError]) -> None:
    field = FieldError(field="steps", message="should be 1 or more", value=0)
    sent = cls("steps: should be 1 or more", errors=[field]).problem.model_dump_json()
    problem = Problem.model_validate_json(sent)
    arrived = errors.from_problem(problem, errors.SafelatentError)
    assert type(arrived) is cls
    assert arrived.problem == problem
    assert str(arrived) == "steps: should be 1 or more"
    assert cls.__doc__ and cls.title


def test_every_error_is_in_the_drawn_tree() -> None:
    assert errors.__doc__
    for cls in errors.ERRORS.values():
        assert cls.__name__ in errors.__doc__


def test_an_unknown_problem_type_is_the_given_class() -> None:
    problem = Problem(type="/problems/of-tomorrow", title="New", status=418)
    assert type(errors.from_problem(problem, errors.RequestError)) is errors.RequestError


@pytest.mark.parametrize(
    ("source", "id"),
    [
        ("models/emoji_scenes", "emoji_scenes"),
        ("/models/emoji_scenes/", "emoji_scenes"),
        ("./here/tiny", "tiny"),
        ("CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
    ],
)
def test_service_and_worker_call_a_checkpoint_alike(source: str, id: str) -> None:
    """Even where the folder is on the worker's machine only."""
    assert model_id(source) == id
