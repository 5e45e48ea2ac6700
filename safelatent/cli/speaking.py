"""How the command line speaks: data to stdout, talk to stderr, and what each exit code means."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from safelatent import (
    Client,
    Finished,
    Generation,
    Image,
    Queued,
    Snapshot,
    Started,
    Step,
    errors,
)
from safelatent.client.events import Event
from safelatent.client.rendering import facts
from safelatent.schema import Progress, Status

LEAST_COLUMN = 12
"""Characters of a table's last column, below which there is no table."""

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

COLOURS = {
    Status.QUEUED: "yellow",
    Status.RUNNING: "cyan",
    Status.SUCCEEDED: "green",
    Status.FAILED: "red",
    Status.CANCELLED: "bright_black",
}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)


def tell(message: str, style: str = "") -> None:
    """Talk, for people."""
    err.print(Text(message, style=style), soft_wrap=not err.is_terminal)


def put(line: str) -> None:
    """One line of data."""
    out.print(Text(line))


def put_json(value: Any) -> None:
    """Data for programs: models, and what JSON has."""
    print(json.dumps(to_jsonable_python(value), indent=2, ensure_ascii=False))


def stop(code: int) -> None:
    if code:
        raise typer.Exit(code)


@contextmanager
def talking(context: typer.Context) -> Iterator[Client]:
    """A client; what goes wrong with it is said in one sentence, and becomes an exit code."""
    try:
        with Client(**context.obj) as client:
            yield client
    except errors.SafelatentError as error:
        tell(f"safelatent: {error}", "red")
        for note in getattr(error, "__notes__", []):
            tell(f"  {note}")
        if isinstance(error, errors.NoAnswer):
            tell(
                "  Is it running? --url or SAFELATENT_URL names another; `safelatent doctor` looks."
            )
        if isinstance(error, errors.Unauthorized):
            tell("  SAFELATENT_API_KEY or --api-key is where the key goes.")
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def exit_code(error: errors.SafelatentError) -> int:
    if isinstance(error, errors.ServiceError):
        return UNREACHABLE
    return FAILED if isinstance(error, errors.JobError | errors.NotFound) else USAGE


def rows(columns: Sequence[str], lines: Sequence[Sequence[str | Text]]) -> None:
    """A table for people, or where it is too narrow an entry each; for a pipe, plain lines with
    tabs between."""
    if not out.is_terminal:
        for line in lines:
            print("\t".join(str(cell).replace("\t", " ").replace("\n", " ") for cell in line))
        return
    page = Console(highlight=False)
    widths = [max(map(len, map(str, column))) + 2 for column in zip(columns, *lines, strict=True)]
    if sum(widths[:-1]) + LEAST_COLUMN > page.width:
        for first, *rest in lines:
            page.print(Text(str(first), style="bold"))
            page.print(Text("  ") + Text(", ").join(Text() + Text.assemble(cell) for cell in rest))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, width in zip(columns, [*(width - 2 for width in widths[:-1]), 1], strict=True):
        table.add_column(column, no_wrap=True, overflow="ellipsis", min_width=width)
    for line in lines:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in line))
    page.print(table)


def pairs(console: Console, named: dict[str, str]) -> None:
    """Names and what they are, one below the other; where nobody looks, with a tab between."""
    if not console.is_terminal:
        for name, said in named.items():
            console.print(Text(f"{name}\t{said}"), soft_wrap=True)
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in named.items():
        style = "red" if name == "blocked" or said.startswith(("flagged", "could not")) else ""
        table.add_row(name, Text(said, style=style))
    console.print(table)


def coloured(status: Status) -> Text:
    return Text(status.value, style=COLOURS[status])


def summary(generation: Generation) -> None:
    """What the safety report says of each image, to stderr."""
    for image in generation.images:
        pairs(err, facts(generation, image))


@contextmanager
def progress() -> Iterator[Callable[[Event[Generation, Image]], None]]:
    """A bar with steps and the time that is left, on a terminal; hears a generation's events."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[steps]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Bar(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        bar = shown.add_task("submitting", total=None, steps="")

        def hear(event: Event[Generation, Image]) -> None:
            match event:
                case Step(step=step, steps=steps):
                    show("drawing", Progress(step=step, steps=steps))
                case Queued(position=position):
                    show(f"queued, {position} before it" if position else "queued")
                case Started():
                    show("started")
                case Snapshot(generation=generation) | Finished(generation=generation):
                    told = generation.progress
                    show("drawing" if told else generation.status.value, told)

        def show(said: str, told: Progress | None = None) -> None:
            shown.update(bar, description=said)
            if told:
                steps = f"{told.step}/{told.steps}"
                shown.update(bar, completed=told.step, total=told.steps, steps=steps)

        yield hear
