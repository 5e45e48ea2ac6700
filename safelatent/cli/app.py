"""The commands: each asks the service through the client, and answers in `speaking`'s ways."""

from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import typer

from safelatent import Generation, Status
from safelatent.cli import keys, saving
from safelatent.cli.speaking import (
    FAILED,
    OK,
    UNREACHABLE,
    coloured,
    out,
    pairs,
    progress,
    put,
    put_json,
    rows,
    stop,
    summary,
    talking,
    tell,
)
from safelatent.client.rendering import facts

app = typer.Typer(
    help="Draw with Safe Latent Diffusion. Data goes to stdout, talk to stderr.",
    epilog="Exit codes: 0 done; 1 the generation failed, was cancelled or has a blocked image, or "
    "there is no such thing; 2 the request cannot be served as it is; 3 the service does not "
    "answer, or cannot work now; 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON, as the service has it.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The generation's id.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID", help="The generations' ids.")]
Labels = Annotated[
    list[str], typer.Option("--metadata", metavar="NAME=VALUE", help="A label of your own.")
]


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="SAFELATENT_URL", help="Where the service is.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SAFELATENT_API_KEY", help="Your key.", show_envvar=True),
    ] = None,
) -> None:
    context.obj = {"base_url": url, "api_key": api_key}


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="A file, a folder, or - for stdout."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option("--level", "-l", help="Safety: off, weak, medium, strong or max."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="The same is the same.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    negative: Annotated[str | None, typer.Option(help="The negative prompt.")] = None,
    concept: Annotated[
        list[str], typer.Option(help="What to steer away from; may be given again.")
    ] = [],  # noqa: B006
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    model: Annotated[str | None, typer.Option(help="One of `safelatent models`.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Of `safelatent capabilities`.")] = None,
    image_format: Annotated[str | None, typer.Option("--format", help="png, webp or jpeg.")] = None,
    checks: Annotated[str | None, typer.Option(help="block or report.")] = None,
    telemetry: Annotated[str | None, typer.Option(help="none, summary, steps or heatmap.")] = None,
    priority: Annotated[str | None, typer.Option(help="high, normal or low.")] = None,
    metadata: Labels = [],  # noqa: B006
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait; the generation goes on.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Say the id and do not wait.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a prompt, save it, and say what safety did.

    Ctrl-C cancels the generation, unless it is detached.
    """
    if output == "-" and as_json:
        raise typer.BadParameter("-o - writes the picture to stdout, where --json would write too")
    if output == "-" and (n or 1) > 1:
        raise typer.BadParameter(f"-o - takes one picture, and -n is {n}")
    safety = _given(level=level, concepts=concept, checks=checks, telemetry=telemetry)
    fields = _given(
        safety=safety,
        seed=seed,
        n=n,
        steps=steps,
        negative_prompt=negative,
        guidance_scale=guidance_scale,
        width=width,
        height=height,
        model=model,
        scheduler=scheduler,
        image_format=image_format,
        priority=priority,
        metadata=_labels(metadata),
    )
    with talking(context) as client:
        if detach:
            submitted = client.submit(prompt, **fields)
            put_json(submitted) if as_json else put(submitted.id)
            tell(f"`safelatent watch {submitted.id}` follows it.")
            return
        try:
            with progress() as hear:
                done = client.generate(prompt, on_event=hear, timeout=timeout, **fields)
        except KeyboardInterrupt:
            tell("Interrupted: the generation is cancelled.")
            raise
        saved = saving.save(done, output)
        summary(done)
        if as_json:
            put_json(done)
        for path in saved:
            (tell if as_json else put)(str(path))
    stop(_code(done))


@app.command()
def status(context: typer.Context, id: Id, as_json: AsJson = False) -> None:
    """Say how a generation stands."""
    with talking(context) as client:
        generation = client.get(id)
    if as_json:
        put_json(generation)
        return
    request = generation.request
    said = {"id": generation.id, "status": generation.status.value}
    if generation.progress:
        said["step"] = f"{generation.progress.step} of {generation.progress.steps}"
    if generation.position is not None:
        said["before it"] = str(generation.position)
    said |= {
        "prompt": request.prompt,
        "created": _ago(generation.created_at),
        "model": request.model or "",
        "safety": request.safety.level,
    }
    if generation.error:
        said["error"] = f"{generation.error.title}: {generation.error.detail}"
    pairs(out, said)
    for image in generation.images:
        pairs(out, facts(generation, image))


@app.command()
def watch(
    context: typer.Context,
    id: Id,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PATH", help="Save it there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON an event.")] = False,
) -> None:
    """Follow a generation to its end. Ctrl-C leaves it alone."""
    with talking(context) as client:
        with progress() as hear:
            for event in client.events(id):
                hear(event)
                if as_json:
                    put(_line(event))
        done = client.get(id)
        done.raise_for_status()
        for path in saving.save(done, output) if output else ():
            (tell if as_json else put)(str(path))
        summary(done)
        if not as_json and not output:
            put(f"{done.id}\t{done.status}")
    stop(_code(done))


@app.command("list")
def list_(
    context: typer.Context,
    status: Annotated[Status | None, typer.Option(help="Only those.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    metadata: Labels = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """List your generations of the last 24 hours, newest first."""
    with talking(context) as client:
        found = [*islice(client.list(status=status, metadata=_labels(metadata)), limit)]
    if as_json:
        put_json(found)
        return
    lines = [
        (
            each.id,
            coloured(each.status),
            _ago(each.created_at),
            each.request.safety.level,
            each.request.prompt,
        )
        for each in found
    ]
    rows(("ID", "STATUS", "CREATED", "SAFETY", "PROMPT"), lines)
    if not found:
        tell("There is none.")


@app.command()
def cancel(context: typer.Context, ids: Ids, as_json: AsJson = False) -> None:
    """Cancel generations; those that have ended stay as they are."""
    with talking(context) as client:
        found = [client.cancel(id) for id in ids]
    if as_json:
        put_json(found)
        return
    for each in found:
        put(f"{each.id}\t{each.status}")


@app.command()
def rm(context: typer.Context, ids: Ids, as_json: AsJson = False) -> None:
    """Delete generations with their images and reports, for ever."""
    with talking(context) as client:
        for id in ids:
            client.delete(id)
            if not as_json:
                put(id)
    if as_json:
        put_json({"deleted": ids})


@app.command()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models that can be asked for."""
    with talking(context) as client:
        found = client.models()
    if as_json:
        put_json(found)
        return
    lines = [
        (each.id, f"{each.width}x{each.height}", each.scheduler, str(each.workers), each.family)
        for each in found
    ]
    rows(("ID", "SIZE", "SCHEDULER", "WORKERS", "FAMILY"), lines)
    if not found:
        tell("No worker has announced a model yet.")


@app.command()
def capabilities(context: typer.Context, as_json: AsJson = False) -> None:
    """Say what you may ask for: limits, levels, schedulers, features."""
    with talking(context) as client:
        found = client.capabilities()
    if as_json:
        put_json(found)
        return
    told = {name: _words(value) for name, value in found.model_dump().items()}
    told["levels"] = _words([*found.levels])
    pairs(out, told)


@app.command()
def compare(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The contact sheet.")
    ] = None,
    levels: Annotated[
        str | None, typer.Option(help="With commas between; all that you may ask for.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of all of them.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    model: Annotated[str | None, typer.Option(help="One of `safelatent models`.")] = None,
    checks: Annotated[str | None, typer.Option(help="block or report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw one seed at several safety levels, as one picture with the numbers under each."""
    try:
        from safelatent.cli import sheet
    except ModuleNotFoundError as error:
        raise typer.BadParameter("compare needs Pillow: pip install 'safelatent[cli]'") from error
    with talking(context) as client:
        wanted = levels.split(",") if levels else client.capabilities().levels
        names = [each.strip() for each in wanted if each.strip() != "custom"]
        safeties = [{"level": name, **_given(checks=checks)} for name in names]
        fields = _given(seed=seed, steps=steps, model=model)
        done = sheet.draw_all(client, prompt, safeties, **fields)
        path = sheet.save(done, output)
    lines = [(each.request.safety.level, *sheet.numbers(each)) for each in done]
    if as_json:
        put_json(done)
        tell(str(path))
    else:
        for level, *numbers in lines:
            tell(f"{level:8} {'  '.join(numbers)}")
        put(str(path))
    stop(max(_code(each) for each in done))


@app.command()
def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Look at everything that must be right, and name the cure where it is not."""
    from safelatent.cli import examining

    found = examining.examine(**context.obj)
    if as_json:
        put_json([finding._asdict() for finding in found])
    else:
        for finding in found:
            examining.show(finding)
    if any(finding.verdict == "bad" and finding.what == "service" for finding in found):
        stop(UNREACHABLE)
    stop(FAILED if any(finding.verdict == "bad" for finding in found) else OK)


@app.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    }
)
def key(context: typer.Context) -> None:
    """Make an API key: `safelatent key new` (needs no extra)."""
    keys.main(["key", *context.args])


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that were given: the service knows the others' defaults."""
    return {name: value for name, value in fields.items() if value not in (None, [], {})}


def _labels(pairs: list[str]) -> dict[str, Any]:
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{pair!r} is no NAME=VALUE")
        labels[name] = value
    return labels


def _code(generation: Generation) -> int:
    return FAILED if any(image.blocked for image in generation.images) else OK


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_words(each)}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _ago(when: datetime) -> str:
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    seconds = max(int((datetime.now(UTC) - when).total_seconds()), 0)
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _line(event: Any) -> str:
    from pydantic_core import to_json

    return to_json({"event": type(event).__name__.lower(), **vars(event)}).decode()
