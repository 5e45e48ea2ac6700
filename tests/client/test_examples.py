"""Every public method shows an example in its docstring, and each example runs as it is shown."""

import ast
import asyncio
import doctest
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from safelatent import (
    AsyncClient,
    AsyncGeneration,
    AsyncImage,
    Client,
    Generation,
    Image,
)

NOUNS = (Client, Generation, Image, AsyncClient, AsyncGeneration, AsyncImage)


def public_methods() -> list[Any]:
    return [
        pytest.param(member, id=f"{cls.__name__}.{name}")
        for cls in NOUNS
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_") and name != "model_post_init"
    ]


def show(value: object) -> None:
    if value is not None:
        print(repr(value))


def run(docstring: str, names: dict[str, Any], runner: asyncio.Runner) -> None:
    """Run the examples of a docstring; those that await run in the runner's loop."""
    examples = doctest.DocTestParser().get_examples(docstring)
    assert examples, "there is no example"
    for example in examples:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(example.source, "<example>", "single", flags, dont_inherit=True)
        with redirect_stdout(io.StringIO()) as said:
            hook, sys.displayhook = sys.displayhook, show
            try:
                made = eval(code, names)
                if inspect.iscoroutine(made):
                    runner.run(made)
            finally:
                sys.displayhook = hook
        got = said.getvalue()
        right = doctest.OutputChecker().check_output(example.want, got, doctest.ELLIPSIS)
        assert right, f"{example.source}gave {got!r}, not {example.want!r}"


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def names_for(is_async: bool, url: str, runner: asyncio.Runner) -> Iterator[dict[str, Any]]:
    """What an example may use: a client, and a generation of it that has succeeded."""
    names: dict[str, Any] = {"url": url, "Client": Client, "AsyncClient": AsyncClient}
    with Client(url) as client:
        generation = client.generate("a cat for u-17", metadata={"user": "u-17"}, seed=7)
        if is_async:
            awaiting = AsyncClient(url)
            generation = runner.run(awaiting.get(generation.id))
            yield names | {"client": awaiting, "generation": generation}
            runner.run(awaiting.aclose())
        else:
            yield names | {"client": client, "generation": generation}


@pytest.mark.parametrize("method", public_methods())
def test_the_example_of(method: Callable[..., Any], url: str, runner: asyncio.Runner) -> None:
    is_async = "Async" in method.__qualname__
    with names_for(is_async, url, runner) as names:
        run(inspect.getdoc(method) or "", names, runner)


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_the_example_of_the_class(cls: Any, url: str, runner: asyncio.Runner) -> None:
    run(inspect.getdoc(cls) or "", {"url": url}, runner)
