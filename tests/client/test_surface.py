"""The face of the package: its names, its types, its twin, and how fast it is there."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import safelatent
from safelatent import AsyncClient, Client, GenerationRequest, SafetyParameters, SafetyRequest
from safelatent.client.fields import RequestFields, SafetyFields, SafetyParameterFields

ROOT = Path(__file__).parents[2]

SCRIPT = """
from pathlib import Path
from safelatent import AsyncClient, Client, Finished, Generation, Image, Snapshot, Step, errors
from safelatent.client import Event

def draw(client: Client) -> Path:
    def tell(event: Event[Generation, Image]) -> None:
        match event:
            case Step(step=step, steps=steps):
                print(step / steps)
            case Snapshot(generation=generation) | Finished(generation=generation):
                print(generation.status.is_terminal)
    try:
        done = client.generate("a cat", seed=7, safety={"level": "strong"}, on_event=tell)
    except errors.GenerationFailed as failed:
        raise SystemExit(failed.problem.title) from failed
    return done.images[0].save("cat.png")

async def draw_async() -> bytes:
    async with AsyncClient() as client:
        async for generation in client.list(status="failed"):
            await generation.wait(timeout=5)
        return await (await client.generate("a cat", safety="max")).images[0].bytes()
"""


def test_every_public_name_is_there_and_listed() -> None:
    assert sorted(safelatent.__all__, key=str.lower) == sorted(
        set(safelatent.__all__), key=str.lower
    )
    for name in safelatent.__all__:
        assert getattr(safelatent, name) is not None


def test_the_blocking_client_is_made_from_the_one_that_awaits() -> None:
    done = subprocess.run([sys.executable, "tools/unasync.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "python tools/unasync.py"


def test_both_clients_have_the_same_verbs() -> None:
    def verbs(cls: type) -> dict[str, list[str]]:
        return {
            name.replace("aclose", "close"): list(inspect.signature(member).parameters)
            for name, member in vars(cls).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }

    assert verbs(Client) == verbs(AsyncClient)
    assert set(verbs(Client)) == {
        *("generate", "submit", "get", "wait", "events", "cancel", "delete", "list"),
        *("image", "models", "capabilities", "close"),
    }


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        (RequestFields, GenerationRequest),
        (SafetyFields, SafetyRequest),
        (SafetyParameterFields, SafetyParameters),
    ],
)
def test_typed_fields_are_those_of_the_contract(fields: type, model: type) -> None:
    expected = set(model.model_fields) - {"prompt"}  # type: ignore[attr-defined]
    assert set(fields.__annotations__) == expected, "safelatent/client/fields.py"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", None),
        ("def wrong(client: Client) -> None: client.generate('a cat', sed=7)", "call-arg"),
        ("def wrong(client: Client) -> None: client.submit('a cat', safety='mild')", "arg-type"),
    ],
)
def test_a_users_script_is_checked_strictly(
    line: str, complaint: str | None, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + line)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(script)]
    cache = f"--cache-dir={ROOT / '.mypy_cache'}"
    done = subprocess.run([*command, cache], cwd=ROOT, capture_output=True, text=True)
    if complaint is None:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode == 1 and f"[{complaint}]" in done.stdout, done.stdout


def test_the_import_brings_nothing_but_pydantic_and_httpx() -> None:
    program = (
        "import sys, pydantic, httpx; before = set(sys.modules); import safelatent\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    brought = {name for name in done.stdout.split() if not name.startswith("_")}
    theirs = {"pydantic", "pydantic_core", "annotated_types"}  # which pydantic imports when asked
    assert brought - sys.stdlib_module_names - theirs == {"safelatent"}, done.stderr
