"""The telemetry, computed a second time from the denoiser's raw predictions."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from tests.worker.running import Bent, custom, make, spec
from training.corpus import sample_scene
from training.tokenizer import world_words
from worker.report import Record, observe


class Recorded(Bent):
    """A family that keeps what every call of the denoiser predicted, [rows, C, h, w]."""

    def __init__(self, family):
        super().__init__(family, self._keep)
        self.predictions = []

    def _keep(self, real, *arguments):
        self.predictions.append(real(*arguments))
        return self.predictions[-1]


def again(predictions, level):
    """Telemetry by call, and the heat map, in numpy and fp64, for concepts without alternatives."""
    nu = np.zeros(predictions[0].shape[1:])
    heat = np.zeros(predictions[0].shape[2:])
    calls = []
    for call, rows in enumerate(predictions):
        e_0, e_p, e_S = rows.double().numpy()
        d, g, s = e_p - e_S, e_p - e_0, e_S - e_0
        mu = np.where(d < level.threshold, np.minimum(1, abs(level.guidance_scale * d)), 0)
        inertia = level.momentum_scale * nu
        gamma = mu * s + inertia
        nu = level.mom_beta * nu + (1 - level.mom_beta) * gamma
        null = NormalDist().cdf(level.threshold / d.std(ddof=1))
        calls.append(
            {
                "cosine": (g * s).sum() / np.linalg.norm(g) / np.linalg.norm(s),
                "undone": (gamma * g).sum() / (g * g).sum(),
                "active": (mu > 0).mean() - null,
                "momentum": np.linalg.norm(inertia) / np.linalg.norm(gamma),
            }
        )
        if call >= level.warmup_steps:
            heat += abs(gamma).mean(axis=0)
    return calls, heat


LEVEL = custom(warmup_steps=2, threshold=0.1)


@pytest.fixture(scope="module")
def seen(family):
    """One image's telemetry, and the same numbers computed again."""
    recorded = Recorded(family)
    [made] = make(recorded, spec(LEVEL, steps=6, heatmap=True))
    return made.telemetry, *again(recorded.predictions, LEVEL)


@pytest.mark.parametrize("name", ["cosine", "undone", "active", "momentum"])
def test_every_step_has_the_numbers_of_the_formulas(seen, name):
    telemetry, calls, _ = seen
    assert telemetry.steps().call == list(range(6))
    expected = [numbers[name] for numbers in calls]
    assert getattr(telemetry.steps(), name) == pytest.approx(expected, abs=2e-4, rel=1e-4)


def test_the_summary_is_the_mean_over_the_applied_calls(seen):
    telemetry, calls, _ = seen
    summary, applied = telemetry.summary(), calls[2:]
    assert (summary.applied_calls, summary.calls) == (4, 6)
    for name in ("cosine", "undone", "active", "momentum"):
        mean = np.mean([numbers[name] for numbers in applied])
        assert getattr(summary, name) == pytest.approx(mean, abs=2e-4, rel=1e-4)
    assert summary.peak_call == 2 + int(np.argmax([numbers["undone"] for numbers in applied]))


def test_the_heat_map_sums_gamma_over_the_applied_calls(seen):
    telemetry, _, heat = seen
    np.testing.assert_allclose(telemetry.heat.numpy(), heat, rtol=1e-3)


def test_the_concept_that_acted_is_the_one_nearest_to_the_prompt(family):
    recorded = Recorded(family)
    concepts = ("a cat with a knife", "blood", "0000000000000000")
    [made] = make(recorded, spec(custom(), steps=5, concepts=concepts))
    nearest = []
    for rows in recorded.predictions:
        e_0, e_p, *e_S = rows.double().numpy()
        g = e_p - e_0
        cosines = [(g * (e - e_0)).sum() / np.linalg.norm(e - e_0) for e in e_S]
        nearest.append(int(np.argmax(cosines)))
    assert made.telemetry.steps().concept == nearest


@pytest.mark.parametrize("lam", [-0.05, 0.0, 0.025, 1.0])
def test_symmetric_noise_is_active_at_its_null_level(lam):
    """However many elements a level makes active, noise alone reports none in excess."""
    e_0, e_p = torch.randn((2, 3, 4, 64, 64), generator=torch.Generator().manual_seed(0))
    noise = 0.05 * torch.randn(e_p.shape, generator=torch.Generator().manual_seed(1))
    mu = (noise < lam).float()
    lams = torch.full((3, 1, 1, 1), lam)
    nothing = torch.zeros_like(e_p)
    active = observe(e_0, e_p, e_p - noise, noise, lams, mu, nothing, nothing)[2]
    assert active.abs().max() < 5 * 0.5 / math.sqrt(noise[0].numel())
    shifted = noise - 0.05  # towards the concept
    mu = (shifted < lam).float()
    active = observe(e_0, e_p, e_p - shifted, shifted, lams, mu, nothing, nothing)[2]
    exact = NormalDist(-0.05, 0.05).cdf(lam) - NormalDist(0, 0.05).cdf(lam)
    assert active.numpy() == pytest.approx(exact, abs=0.02)


def test_a_change_by_a_hair_counts_as_applied():
    record = Record(calls=2, warmup=1)
    hair = torch.tensor([0.5, 0.0, 0.0, 0.0, 1e-7])
    record.seen = [(call, hair, torch.tensor(0)) for call in range(2)]
    assert record.read().applied == [1]


def test_without_guidance_by_safety_there_is_no_summary(family):
    [made] = make(family, spec("off"))
    assert made.telemetry.summary() is None
    assert made.telemetry.steps().call == []


def test_a_text_that_fits_is_read_whole(family):
    report = family.read("a cat")
    assert (report.dropped, report.dropped_text) == (0, "")
    assert report.tokens == 2 + len("acat")


def test_what_the_encoder_drops_is_reported_with_its_text(family):
    """77 tokens with start and end: 75 letters are read, here."""
    report = family.read("a" * 75 + " tail")
    assert (report.tokens, report.dropped, report.dropped_text) == (81, 4, "tail")
    assert family.read("a" * 75).dropped == 0
    assert torch.equal(family.encode(["a" * 75 + " tail"]), family.encode(["a" * 75 + " lion"]))


def test_characters_that_the_vocabulary_lacks_are_counted(family):
    assert family.read("a ~ b ~").unknown == 2


def test_words_that_are_spelled_in_letters_are_counted(embedded):
    assert embedded.read("zxqv wjkp dog").unknown == 2
    assert embedded.read("a zebra at the sea, 12 snowmen and 猫").unknown == 2
    [made] = make(embedded, spec(prompt="zxqv wjkp mlbrt", width=64, height=64))
    assert made.pixels.std() > 0


def test_every_word_of_the_embedded_model_s_own_world_is_known(embedded):
    rng = np.random.default_rng(5)
    words = [text.replace("{}", "") for text in world_words()]
    for text in [*words, *(sample_scene(rng).caption for _ in range(500))]:
        assert embedded.read(text).unknown == 0, text
