"""The running batch: nobody's image depends on the others, and no row is computed for nothing."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safelatent import errors
from safelatent.safety import CONCEPT
from tests.worker.running import Bent, custom, difference, make, outcome, outcomes, spec
from tests.worker.running import step_until_idle as finish
from worker.engine import Engine, Image, ImageSpec, Made
from worker.families.stable_diffusion import StableDiffusion

SAME = 1e-4
LEVELS = {
    "off": "off",
    "no warm-up": custom(threshold=0.2),
    "with warm-up": custom(warmup_steps=2),
    "without momentum": custom(warmup_steps=1, momentum_scale=0),
}

alone: dict[ImageSpec, Tensor] = {}


def latents_alone(family: StableDiffusion, one: ImageSpec) -> Tensor:
    """Of an image that is made by itself; remembered."""
    if one not in alone:
        alone[one] = make(family, one)[0].latents
    return alone[one]


images = st.builds(
    lambda level, **changed: spec(LEVELS[level], **changed),
    st.sampled_from(sorted(LEVELS)),
    prompt=st.sampled_from(["a cat", "two dogs"]),
    seed=st.integers(0, 2),
    width=st.sampled_from([32, 48]),
    scheduler=st.sampled_from(["ddim", "euler", "dpmpp_2m"]),
    steps=st.integers(3, 6),
    guidance_scale=st.sampled_from([3.0, 7.5]),
)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.lists(
        st.tuples(images, st.integers(0, 4), st.none() | st.integers(0, 5)), min_size=2, max_size=5
    ),
    max_rows=st.sampled_from([1, 8, 100]),
)
def test_an_image_is_the_same_whoever_joins_leaves_or_is_cancelled_beside_it(
    family, batch, max_rows
):
    """Of each: what it is, before which step it is submitted, before which it is cancelled."""
    engine = Engine(family, max_rows=max_rows)
    submitted: dict[int, Image] = {}
    for step in range(6):
        for i, (one, joins, leaves) in enumerate(batch):
            if joins == step:
                submitted[i] = engine.submit(one)
            if leaves == step and i in submitted:
                submitted[i].cancel()
        engine.step()
    finish(engine)
    for i, (one, joins, leaves) in enumerate(batch):
        if leaves is None or leaves < joins:
            made = submitted[i].future.result(timeout=0)
            assert difference(made.latents, latents_alone(family, one)) < SAME
        else:
            assert submitted[i].future.done()


def test_a_cancelled_image_takes_no_further_step(family):
    watched = Bent(family)
    engine = Engine(watched)
    leaves, stays = engine.submit(spec(steps=9)), engine.submit(spec(steps=3))
    engine.step()
    leaves.cancel()
    finish(engine)
    assert watched.rows == [4, 2, 2]
    assert leaves.future.cancelled() or outcome(leaves) is not None
    assert stays.future.result(timeout=0).pixels.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("level", "changed", "rows"),
    [
        ("off", {}, [2] * 17),
        ("off", {"guidance_scale": 1.0}, [1] * 17),
        ("off", {"guidance_scale": 0.0}, [1] * 17),
        ("weak", {}, [2] * 15 + [3] * 2),
        ("weak", {"guidance_scale": 1.0}, [1] * 17),
        ("medium", {}, [3] * 17),
        ("strong", {}, [3] * 17),
        ("max", {}, [3] * 17),
        (custom(warmup_steps=5, momentum_scale=0), {}, [2] * 5 + [3] * 12),
        (custom(warmup_steps=5, mom_beta=1), {}, [2] * 5 + [3] * 12),
        (custom(warmup_steps=5), {"concepts": ("blood", "a gun")}, [4] * 17),
    ],
)
def test_only_rows_that_can_change_the_image_are_computed(
    family, monkeypatch, level, changed, rows
):
    one = spec(level, steps=17, **changed)
    watched = Bent(family)
    [made] = make(watched, one)
    assert watched.rows == rows
    if 2 in rows and 3 in rows:  # computing them anyway gives the same image
        monkeypatch.setattr(Image, "needs_concepts", True)
        watched = Bent(family)
        [anyway] = make(watched, one)
        assert watched.rows == [3] * 17
        assert difference(made.latents, anyway.latents) < SAME


def test_a_call_has_no_more_rows_than_allowed_but_for_one_image_alone(family):
    watched = Bent(family)
    crowd = [spec("max", seed=i, steps=3) for i in range(7)]
    large = spec("max", width=64, height=64, steps=3)  # twelve rows of the native size
    made = make(watched, *crowd[:4], large, *crowd[4:], max_rows=7)
    assert len(made) == 8
    assert max(watched.rows) == 6
    assert watched.rows == [6] * 6 + [3] * 3 + [6] * 3 + [3] * 3


def test_texts_are_encoded_once(family):
    watched = Bent(family)
    engine = Engine(watched)
    for seed in range(3):
        engine.submit(spec("max", seed=seed))
        engine.submit(spec("max", seed=seed, prompt="a dog", negative_prompt="a cat"))
        finish(engine)
    assert sorted(watched.encoded) == sorted(["", "a cat", "a dog", CONCEPT])


def test_of_several_concepts_the_nearest_acts(family):
    """When one concept is the nearest at every call, the image is that of this concept alone."""
    both = spec("max", steps=6, concepts=("quiet blue rooms", "a cat with a knife"))
    [made] = make(family, both)
    [chosen] = set(made.telemetry.concepts)
    singles = [make(family, replace(both, concepts=(one,)))[0] for one in both.concepts]
    assert difference(made.latents, singles[chosen].latents) < SAME
    assert difference(made.latents, singles[1 - chosen].latents) > SAME
    [swapped] = make(family, replace(both, concepts=both.concepts[::-1]))
    assert set(swapped.telemetry.concepts) == {1 - chosen}
    assert difference(made.latents, swapped.latents) < SAME


@pytest.mark.parametrize("threshold", [-10.0, -0.3, 0.0, 1.0])
def test_applied_is_true_exactly_when_the_image_is_another_than_without_safety(family, threshold):
    safe = spec(custom(warmup_steps=1, threshold=threshold, guidance_scale=1.001))
    [made], [without] = make(family, safe), make(family, replace(safe, safety=None, concepts=()))
    changed = difference(made.latents, without.latents) > 0
    assert bool(made.telemetry.applied) is changed
    assert changed is (threshold != -10)


# -- failures ----------------------------------------------------------------------------------


def bent_for(family: StableDiffusion, prompt: str, spoil, after: int = 0) -> Bent:
    """A family that spoils every call, past the first ones, that has a row of this prompt."""
    calls = 0

    def predict(real, latents, timesteps, embeddings):
        nonlocal calls
        rows = bent.holds(embeddings, prompt)
        predictions = real(latents, timesteps, embeddings)
        if rows.any():
            calls += 1
            if calls > after:
                return spoil(predictions, rows)
        return predictions

    bent = Bent(family, predict)
    return bent


def crash(predictions: Tensor, rows: Tensor) -> Tensor:
    raise RuntimeError("a kernel failed")


def give_nan(predictions: Tensor, rows: Tensor) -> Tensor:
    predictions[rows] = float("nan")
    return predictions


def run_out_of_memory(predictions: Tensor, rows: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")


@pytest.mark.parametrize(
    ("spoil", "after", "kind"),
    [
        (crash, 0, RuntimeError),
        (crash, 2, RuntimeError),
        (give_nan, 0, errors.BadNumbers),
        (run_out_of_memory, 1, errors.OutOfMemory),
    ],
)
def test_a_bad_image_fails_alone_and_its_neighbours_are_unchanged(family, spoil, after, kind):
    neighbours = [spec("max", seed=i, steps=4 + i, width=32 + 16 * (i == 3)) for i in range(5)]
    bad = spec("max", prompt="the bad one", steps=5)
    bent = bent_for(family, "the bad one", spoil, after)
    *before, failed, last = outcomes(
        Engine(bent, max_rows=100), [*neighbours[:4], bad, neighbours[4]]
    )
    assert isinstance(failed, kind)
    for one, made in zip(neighbours, [*before, last], strict=True):
        assert difference(made.latents, latents_alone(family, one)) < SAME


def test_a_batch_that_does_not_fit_is_made_in_parts(family):
    def predict(real, latents, timesteps, embeddings):
        if len(latents) > 6:
            raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")
        return real(latents, timesteps, embeddings)

    bent = Bent(family, predict)
    crowd = [spec("max", seed=i) for i in range(7)]
    for one, made in zip(crowd, outcomes(Engine(bent, max_rows=100), crowd), strict=True):
        assert difference(made.latents, latents_alone(family, one)) < SAME
    assert max(bent.rows) == 21


def test_an_image_that_does_not_fit_alone_is_told_so_with_its_size(family):
    def predict(real, latents, timesteps, embeddings):
        if latents.shape[-1] > 8:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return real(latents, timesteps, embeddings)

    too_large, fits = outcomes(Engine(Bent(family, predict)), [spec(width=64), spec()])
    assert isinstance(too_large, errors.OutOfMemory)
    assert "64 x 32" in str(too_large)
    assert fits.pixels.shape == (32, 32, 3)


def test_an_image_that_cannot_join_fails_alone(family):
    """LCM cannot take more steps than it was distilled for."""
    bad, good = outcomes(Engine(family), [spec(scheduler="lcm", steps=60), spec()])
    assert isinstance(bad, ValueError)
    assert difference(good.latents, latents_alone(family, spec())) < SAME


def test_after_an_error_that_ends_the_device_nobody_gets_an_answer_from_it(family):
    def predict(real, *arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = Engine(Bent(family, predict))
    images = [engine.submit(spec(seed=seed)) for seed in range(2)]
    engine.run(threading.Event())  # comes back although nobody asked it to stop
    assert "illegal memory access" in str(engine.poisoned)
    assert not any(image.future.done() for image in images)


class Unreadable(Bent):
    """A family that cannot encode one text."""

    def __init__(self, family: StableDiffusion, text: str, error: Exception):
        super().__init__(family)
        self.text, self.error = text, error

    def encode(self, texts: Sequence[str]) -> Tensor:
        if self.text in texts:
            raise self.error
        return super().encode(texts)


def test_a_text_that_cannot_be_encoded_fails_its_own_image_alone(family):
    engine = Engine(Unreadable(family, "a dog", KeyError("no such token")))
    early = engine.submit(spec(seed=5))
    engine.step()
    made = outcomes(engine, [spec(prompt="a dog"), spec()])
    assert isinstance(made[0], KeyError)
    assert difference(made[1].latents, latents_alone(family, spec())) < SAME
    assert isinstance(outcome(early), Made)


def test_an_error_that_ends_the_device_is_known_wherever_it_comes_up(family):
    """A GPU reports it at whatever is asked of it next."""
    poison = RuntimeError("CUDA error: an illegal memory access was encountered")
    engine = Engine(Bent(family))
    engine.after_step = Mock(side_effect=poison)
    image = engine.submit(spec())
    engine.run(threading.Event())
    assert engine.poisoned is poison and not image.future.done()

    engine = Engine(Unreadable(family, "a cat", poison))
    image = engine.submit(spec())
    engine.run(threading.Event())
    assert engine.poisoned is not None and not image.future.done()


def test_out_of_memory_ends_nobody_and_later_calls_are_smaller(family):
    def predict(real, latents, *rest):
        if len(latents) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(latents, *rest)

    bent = Bent(family, predict)
    engine = Engine(bent, max_rows=24)
    made = outcomes(engine, [spec(seed=seed, guidance_scale=7.5) for seed in range(8)])
    assert all(isinstance(one, Made) for one in made)
    outcomes(engine, [spec(seed=seed, guidance_scale=7.5) for seed in range(8)])
    assert engine.max_rows <= 5
    bent.rows.clear()
    again = outcomes(engine, [spec(seed=seed, guidance_scale=7.5) for seed in range(8)])
    assert max(bent.rows) <= 5
    for one, other in zip(made, again, strict=True):
        assert difference(one.latents, other.latents) < 1e-5
