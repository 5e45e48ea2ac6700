"""The page: what may be chosen on the left, what came of it on the right."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.blocks import Block

from playground import render
from playground.talk import Choices, Side, Talk
from playground.words import said
from safelatent.errors import SafelatentError

EXAMPLES = (
    "a gangster",
    "a vampire",
    "a ninja",
    "a soldier",
    "a cowboy",
    "a dancer",
    "a rock star",
    "an angry driver",
    "a panda in the snow",
)
"""All but the last are captions of models/emoji_scenes that name nothing unsafe, and that it mostly
saw with something unsafe beside them."""

Update = dict[Any, Any]


def build(talk: Talk, url: str, shown_url: str, has_key: bool) -> gr.Blocks:
    """The page, for `gr.Blocks.launch`. `url` is the service's, `shown_url` that of its callers."""

    def choices() -> Update:
        """What this caller may choose, asked anew whenever the page is opened."""
        try:
            found = talk.choices()
        except SafelatentError as error:
            return {
                service: _service(None),
                results: render.alert(said(error, url, has_key)),
            }
        levels, can = found.levels, found.can
        ids = [model.id for model in found.models]
        return {
            service: _service(found),
            results: render.empty(),
            model: gr.update(choices=ids, value=ids[0] if ids else None),
            level_a: gr.update(choices=levels, value=levels[0]),
            level_b: gr.update(choices=levels, value=_liked(levels)),
            steps: gr.update(maximum=min(int(can.limits["steps"] or 100), 100)),
            concepts: gr.update(
                value="\n".join(can.concepts),
                interactive=not can.concepts_fixed,
                info="Fixed by your policy." if can.concepts_fixed else CONCEPTS_INFO,
            ),
            withhold: gr.update(interactive=not can.concepts_fixed),
        }

    def draw(asked: dict[Any, Any]) -> Iterator[Update]:
        """Ask for both levels at once, and show how they come along."""
        seed_now = secrets.randbelow(2**31) if asked[seed] is None else int(asked[seed])
        body = {
            "prompt": asked[prompt],
            "model": asked[model],
            "seed": seed_now,
            "steps": asked[steps],
            "guidance_scale": asked[guidance],
        }
        safety = {
            "concepts": [line.strip() for line in asked[concepts].splitlines() if line.strip()],
            "checks": "block" if asked[withhold] else "report",
            "telemetry": "heatmap",
        }
        bodies = [
            body | {"safety": {"level": asked[each], **safety}} for each in (level_a, level_b)
        ]
        yield {
            seed: seed_now,
            go: gr.update(visible=False),
            stop: gr.update(visible=True),
            told: "Asking …",
            bars: "",
        }
        sides: list[Side] = []
        for sides in talk.compare(bodies):
            yield {
                told: render.told(sides),
                bars: render.progress(sides),
                running: [side.generation.id for side in sides if side.generation],
            }
        yield {
            go: gr.update(visible=True),
            stop: gr.update(visible=False),
            bars: "",
            running: [],
            results: render.results(sides, url, shown_url, has_key),
        }

    def cancel(ids: list[str]) -> str:
        try:
            talk.cancel(ids)
        except SafelatentError as error:
            return said(error, url, has_key).title
        return "Stopping …"

    page = gr.Blocks(title="safelatent", analytics_enabled=False, fill_width=True)
    with page:
        running = gr.State([])
        with gr.Row(elem_id="top", equal_height=True):
            gr.HTML(
                "<h1>safelatent <span>one seed, two safety levels</span></h1>",
                apply_default_css=False,
            )
            service = gr.HTML(_service(None), elem_id="service", apply_default_css=False)
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="controls", min_width=280):
                with gr.Column(elem_id="ask"):
                    prompt = gr.Textbox(
                        EXAMPLES[0], label="Prompt", lines=2, max_lines=6, elem_id="prompt"
                    )
                    with gr.Row(elem_id="examples"):
                        tries = [gr.Button(each, size="sm", min_width=0) for each in EXAMPLES]
                    with gr.Row(elem_id="buttons"):
                        go = gr.Button("Draw both", variant="primary", elem_id="go")
                        stop = gr.Button("Stop", visible=False, elem_id="stop")
                    told = gr.HTML("", elem_id="told", apply_default_css=False)
                    bars = gr.HTML("", elem_id="bars", apply_default_css=False)
                with gr.Column(elem_id="settings"):
                    level_a = gr.Radio(label="Level A", elem_classes="levels", elem_id="level-a")
                    level_b = gr.Radio(label="Level B", elem_classes="levels", elem_id="level-b")
                    with gr.Row(elem_id="seeds"):
                        seed = gr.Number(
                            1, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120
                        )
                        another = gr.Button("New seed", size="sm", min_width=90, elem_id="another")
                    withhold = gr.Checkbox(
                        True, label="Withhold pictures that a check flags", elem_id="withhold"
                    )
                    with gr.Accordion(
                        "Concepts, steps, guidance, model", open=False, elem_id="more"
                    ):
                        concepts = gr.Textbox(
                            label="Concepts",
                            info=CONCEPTS_INFO,
                            lines=4,
                            max_lines=8,
                            elem_id="concepts",
                        )
                        steps = gr.Slider(1, 100, 25, step=1, label="Steps", elem_id="steps-asked")
                        guidance = gr.Slider(
                            0, 20, 7.5, step=0.5, label="Guidance", elem_id="guidance"
                        )
                        model = gr.Dropdown(label="Model", elem_id="model")
            with gr.Column(elem_id="seen"):
                results = gr.HTML(render.empty(), elem_id="results", apply_default_css=False)

        # Any: Gradio takes sets, and answers by component with them, but its types lack them.
        offered: Any = {service, results, model, level_a, level_b, steps, concepts, withhold}
        shown: Any = {seed, go, stop, told, bars, running, results}
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        page.load(
            choices,
            None,
            offered,
            **quiet,
        )
        asked: set[Block] = {prompt, model, level_a, level_b, seed, steps, guidance}
        asked |= {concepts, withhold}
        for event in (go.click, prompt.submit):
            event(draw, asked, shown, **quiet)
        for button in tries:
            button.click(_same(button.value), None, prompt, **quiet).then(
                draw, asked, shown, **quiet
            )
        another.click(lambda: secrets.randbelow(2**31), None, seed, **quiet).then(
            draw, asked, shown, **quiet
        )
        stop.click(cancel, running, told, **quiet)
    return page


CONCEPTS_INFO = "What to steer away from, one a line. With several, each step acts on the nearest."


def _same(value: str) -> Callable[[], str]:
    return lambda: value


def _liked(levels: list[str]) -> str:
    """The level that is compared with the weakest, unless somebody chooses."""
    return "strong" if "strong" in levels else levels[-1]


def _service(found: Choices | None) -> str:
    if found is None:
        return '<p class="service away">service away</p>'
    workers = sum(model.workers for model in found.models)
    noun = "worker" if workers == 1 else "workers"
    return f'<p class="service">service ready, {workers} {noun}</p>'
