"""Image checks fail closed, and the checkpoint's own checker decides as diffusers does."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessorPil

from safelatent.schema import Check, SafetyRequest
from tests.checkpoint import add_safety_checker
from worker.checks import Checks
from worker.checks.sd_checker import SDChecker
from worker.families import UnusableModel
from worker.tasks import _blocked


def noise(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return list(random.integers(0, 256, (count, 48, 64, 3), dtype=np.uint8))


class Played:
    """A check that answers by a function."""

    name, version = "played", "1"

    def __init__(self, judge):
        self.judge = judge


def verdict(score: float = 0.1) -> Check:
    return Check(
        check="played", version="1", flagged=False, scores={"red": score}, thresholds={"red": 0.5}
    )


def crash(pictures):
    raise RuntimeError("the check has a defect")


def hang(pictures):
    released.wait(30)
    return [verdict() for _ in pictures]


released = threading.Event()


@pytest.fixture(autouse=True)
def release_what_hangs():
    released.clear()
    yield
    released.set()


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (crash, "the check has a defect"),
        (hang, "TimeoutError after 0.05 s"),
        (lambda pictures: [verdict()], "1 verdicts for 2 pictures"),
        (lambda pictures: [verdict(float("nan")) for _ in pictures], "a score is NaN or infinite"),
        (lambda pictures: None, "has no len"),
    ],
)
@pytest.mark.parametrize("policy", ["block", "report"])
def test_a_check_that_cannot_judge_blocks_whatever_the_policy(judge, said, policy):
    checks = Checks([Played(judge), Played(lambda pictures: [verdict() for _ in pictures])], 0.05)
    for failed, fine in checks.judge(noise(2)):
        assert said in failed.error
        assert failed.flagged
        assert fine == verdict()
        blocked = _blocked([fine, failed], SafetyRequest(checks=policy))
        assert blocked.category == "check_failed"


def test_a_check_that_hangs_for_ever_does_not_keep_the_process_from_ending():
    threads = []
    check = Played(lambda pictures: threads.append(threading.current_thread()))
    Checks([check]).judge(noise(1))
    assert threads[0].daemon


def test_one_bad_number_blocks_one_picture():
    scores = [0.1, float("inf"), 0.2]
    checks = Checks([Played(lambda pictures: [verdict(score) for score in scores])])
    verdicts = [verdicts[0].error for verdicts in checks.judge(noise(3))]
    assert verdicts == [None, "a score is NaN or infinite", None]


def test_a_flagged_picture_is_blocked_for_its_worst_category_or_reported():
    check = Check(
        check="played",
        version="1",
        flagged=True,
        scores={"red": 0.6, "blue": 0.5, "green": 0.9},
        thresholds={"red": 0.5, "blue": 0.2, "green": 1.0},
    )
    blocked = _blocked([verdict(), check], SafetyRequest(checks="block"))
    assert (blocked.category, blocked.score, blocked.threshold) == ("blue", 0.5, 0.2)
    assert _blocked([verdict(), check], SafetyRequest(checks="report")) is None
    assert _blocked([verdict()], SafetyRequest(checks="block")) is None


# -- the checkpoint's own checker ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_safety_checker(tmp_path_factory.mktemp("models") / "checked")


@pytest.fixture
def checker(folder: Path) -> SDChecker:
    [checker] = SDChecker.of(folder, "r1", torch.device("cpu"))
    checker.model.requires_grad_(False)  # so that a test may set its thresholds
    return checker


def theirs(folder: Path, checker: SDChecker, pictures: list[np.ndarray]) -> list[bool]:
    """diffusers' decisions, with the thresholds of our checker."""
    reference = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
    reference.load_state_dict(checker.model.state_dict())
    processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    pixels = processor([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    return reference(pixels, [np.zeros((1, 1, 3)) for _ in pictures])[1]


def test_its_decisions_are_those_of_diffusers(folder, checker):
    """At thresholds around every picture's best score, so that each decision is put to the test.

    diffusers rounds a margin to three digits before it asks whether it is positive: margins
    nearer to zero than that are left out.
    """
    pictures = noise(12)
    best = sorted(max(check.scores.values()) for check in checker.judge(pictures))
    decided = set()
    for threshold in [best[0] - 0.05, *[score + 0.003 for score in best]]:
        checker.model.concept_embeds_weights.fill_(threshold)
        ours = checker.judge(pictures)
        clear = [all(abs(c.scores[n] - c.thresholds[n]) > 0.001 for n in c.scores) for c in ours]
        pairs = zip(ours, theirs(folder, checker, pictures), clear, strict=True)
        compared = [(check.flagged, flagged) for check, flagged, is_clear in pairs if is_clear]
        assert all(a == b for a, b in compared)
        decided |= set(compared)
    assert decided == {(True, True), (False, False)}


def test_special_care_lowers_the_thresholds_of_that_picture(folder, checker):
    """A margin of -0.005 is below the threshold, unless a special-care concept is near."""
    [picture] = noise(1)
    best = max(checker.judge([picture])[0].scores.values())
    checker.model.concept_embeds_weights.fill_(best + 0.005)
    for care, expected in ((1.0, False), (-1.0, True)):
        checker.model.special_care_embeds_weights.fill_(care)
        [check] = checker.judge([picture])
        assert check.flagged is expected
        assert theirs(folder, checker, [picture]) == [expected]
        limit = best + 0.005 - (0.01 if expected else 0)
        assert list(check.thresholds.values()) == pytest.approx([limit] * 17)


def test_a_score_that_is_not_a_number_flags(checker):
    checker.model.concept_embeds[0] = float("nan")
    checker.model.concept_embeds_weights.fill_(2.0)
    [check] = checker.judge(noise(1))
    assert check.flagged
    [[said]] = Checks([checker]).judge(noise(1))
    assert said.error == "a score is NaN or infinite"


def test_slots_without_a_name_are_left_out(checker):
    checker.concept_names = ["red", None, *[f"other {i}" for i in range(15)]]
    [check] = checker.judge(noise(1))
    assert len(check.scores) == 16 and "red" in check.scores


def test_a_checkpoint_without_a_checker_has_none(checkpoint):
    assert SDChecker.of(checkpoint, "r1", torch.device("cpu")) == []


@pytest.mark.parametrize("lost", ["safety_checker/model.safetensors", "feature_extractor"])
def test_half_a_checker_makes_the_checkpoint_unusable(tmp_path, lost):
    folder = add_safety_checker(tmp_path)
    path = folder / lost
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(UnusableModel, match="cannot read the safety checker"):
        SDChecker.of(folder, "r1", torch.device("cpu"))
