"""A generation's way through the desk: what is stored, what is withheld, what is said."""

import io
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from safelatent import events
from safelatent.errors import StoreUnavailable
from safelatent.jobs import Jobs
from safelatent.safety import CONCEPT, LEVELS
from safelatent.schema import Check, GenerationRequest, Result, Status
from safelatent.store import Store, image_key
from tests.worker.running import Bent
from worker.checks import Checks
from worker.engine import Engine
from worker.families.stable_diffusion import StableDiffusion
from worker.tasks import Desk

ID = "f0e1"


class RedCheck:
    """Gives pictures the scores that it was told, in the order in which it sees them."""

    name, version = "red", "1"

    def __init__(self) -> None:
        self.scores = [0.1] * 3

    def judge(self, pictures: Any) -> list[Check]:
        scores, self.scores = self.scores[: len(pictures)], self.scores[len(pictures) :]
        return [
            Check(
                check="red",
                version="1",
                flagged=score > 0.5,
                scores={"redness": score},
                thresholds={"redness": 0.5},
            )
            for score in scores
        ]


class Office:
    """A desk with its engine's thread."""

    def __init__(self, family: Any, connection: Redis, folder: Path):
        self.folder = folder
        self.check = RedCheck()
        self.engine = Engine(family, Checks([self.check]))
        self.desk = Desk(self.engine, Store(f"file://{folder}"), Jobs(connection))

    def generate(self, age_s: float = 0, **changed: Any) -> Result:
        body = {"prompt": "a cat", "seed": 3, "steps": 3, "safety": {"level": "max"}, **changed}
        request = GenerationRequest.model_construct(**dict(GenerationRequest(**body)))
        created_at = datetime.now(UTC) - timedelta(seconds=age_s)
        stop = threading.Event()
        thread = threading.Thread(target=self.engine.run, args=(stop,))
        thread.start()
        try:
            return self.desk.generate(ID, request, created_at)
        finally:
            stop.set()
            thread.join()

    def stored(self) -> set[str]:
        return {re.sub("-[0-9a-f]{32}", "", path.name) for path in (self.folder / ID).glob("*")}


@pytest.fixture
def office(family: StableDiffusion, connection: Redis, tmp_path: Path) -> Iterator[Office]:
    return Office(family, connection, tmp_path)


def test_the_result_holds_the_request_as_effective_and_what_was_done(office):
    result = office.generate(negative_prompt="a dog", n=1)
    assert result.status == Status.SUCCEEDED
    effective = result.request
    assert (effective.model, effective.width, effective.height) == ("tiny", 32, 32)
    assert effective.scheduler == "ddim"
    done = result.safety.effective
    assert (done.level, done.parameters, done.concepts) == ("max", LEVELS["max"], [CONCEPT])
    assert (done.applied, done.reason, done.warmup_share) == (True, None, 0)
    assert done.model_revision == office.engine.family.model.revision
    # Longer than this tiny encoder, whose vocabulary has letters and no words.
    assert [report.text for report in done.texts if report.dropped] == [CONCEPT]
    [image] = result.images
    assert (image.url, image.seed) == (f"/generations/{ID}/images/0", 3)
    assert office.stored() == {"0.png"}


def test_level_off_and_a_level_without_effect_say_why(office):
    done = office.generate(safety={"level": "off"}).safety.effective
    assert (done.applied, done.reason, done.parameters) == (False, "level is off", None)
    numb = LEVELS["max"].model_copy(update={"threshold": -10.0})
    safety = {"level": "custom", "parameters": numb.model_dump()}
    done = office.generate(safety=safety).safety.effective
    assert done.applied is False
    assert "threshold" in done.reason


def test_the_warm_ups_share_is_of_the_denoiser_calls(office):
    parameters = LEVELS["strong"].model_copy(update={"warmup_steps": 3})
    safety = {"level": "custom", "parameters": parameters.model_dump()}
    result = office.generate(safety=safety, steps=4, scheduler="heun")
    assert result.safety.effective.warmup_share == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    ("telemetry", "files", "parts"),
    [
        ("none", {"0.png"}, set()),
        ("summary", {"0.png"}, {"summary"}),
        ("steps", {"0.png"}, {"summary", "steps"}),
        ("heatmap", {"0.png", "0.heatmap.png"}, {"summary", "steps", "heatmap_url"}),
    ],
)
def test_each_word_of_telemetry_includes_those_before(office, telemetry, files, parts):
    [image] = office.generate(safety={"level": "max", "telemetry": telemetry}).images
    assert office.stored() == files
    for part in ("summary", "steps", "heatmap_url"):
        assert (getattr(image.safety, part) is not None) is (part in parts)


def test_the_heat_map_is_a_grey_picture_scaled_to_its_maximum(office):
    office.generate(safety={"level": "max", "telemetry": "heatmap"})
    [path] = (office.folder / ID).glob("0-*.heatmap.png")
    heat = np.asarray(Image.open(path))
    assert (heat.shape, heat.max()) == ((8, 8), 255)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_an_image_is_of_the_format_asked_for_and_carries_no_metadata(office, image_format):
    [image] = office.generate(image_format=image_format).images
    assert image.media_type == f"image/{image_format}"
    content = office.desk.store.get(image_key(ID, 0, image.sha256, image_format))
    picture = Image.open(io.BytesIO(content))
    assert picture.format.lower() == image_format
    assert not picture.getexif() and "prompt" not in picture.info
    assert b"a cat" not in content


def test_an_image_is_stored_and_announced_before_its_neighbours_are_done(office):
    announced, told = [], office.desk._announce

    def announce(id, image):
        announced.append((image.index, office.stored()))
        told(id, image)

    office.desk._announce = announce
    result = office.generate(n=3, safety={"level": "max", "telemetry": "steps"})
    assert len(announced) == 3
    for count, (index, stored) in enumerate(announced, 1):
        assert len(stored) == count and f"{index}.png" in stored
    connection = office.desk.jobs.connection
    news = [one for _, one in events.since(connection, ID, "0-0")]
    assert sorted(one.data.index for one in news) == [0, 1, 2]
    for image, one in zip(result.images, events.images(connection, ID), strict=True):
        assert one.safety.steps is None and image.safety.steps is not None
        assert (one.url, one.sha256) == (image.url, image.sha256)


def test_a_second_attempt_tells_no_image_again(office):
    for _ in range(2):
        office.generate(n=2)
    assert len(office.desk.jobs.connection.xrange(events.STREAM)) == 2


def test_who_is_not_sure_of_its_leases_stores_an_image_and_announces_none(office):
    office.desk.is_sure = lambda: False
    office.generate()
    assert office.stored() == {"0.png"}
    connection = office.desk.jobs.connection
    assert not connection.exists(events.STREAM) and events.images(connection, ID) == []


def test_a_blocked_image_has_no_heat_map(office):
    office.check.scores = [0.9, 0.1]
    result = office.generate(n=2, safety={"level": "max", "telemetry": "heatmap"})
    assert [image.safety.heatmap_url is None for image in result.images] == [True, False]
    assert office.stored() == {"1.png", "1.heatmap.png"}


def test_a_blocked_image_is_nowhere_and_its_neighbour_is_delivered(office):
    office.check.scores = [0.9, 0.1]
    flagged, fine = office.generate(n=2).images
    assert (flagged.url, flagged.sha256) == (None, None)
    assert (flagged.blocked.category, flagged.blocked.score) == ("redness", 0.9)
    assert fine.blocked is None
    assert office.stored() == {"1.png"}


def test_with_checks_reported_a_flagged_image_is_delivered_with_its_verdict(office):
    office.check.scores = [0.9]
    [image] = office.generate(safety={"level": "max", "checks": "report"}).images
    assert image.blocked is None
    assert image.safety.checks[0].flagged
    assert office.stored() == {"0.png"}


def test_a_check_that_fails_withholds_the_image_even_if_only_a_report_is_asked(office):
    office.check.scores = []
    [image] = office.generate(safety={"level": "max", "checks": "report"}).images
    assert image.blocked.category == "check_failed"
    assert office.stored() == set()


def test_a_job_that_waited_past_its_deadline_costs_nothing(office):
    watched = office.engine.family = Bent(office.engine.family)
    result = office.generate(age_s=30, deadline_s=20)
    assert result.status == Status.FAILED
    assert result.error.type == "/problems/deadline-exceeded"
    assert watched.rows == []
    assert office.generate(age_s=30, deadline_s=40).status == Status.SUCCEEDED


def test_a_size_that_the_model_cannot_make_is_the_callers_fault(office):
    result = office.generate(width=42)
    assert result.error.type == "/problems/invalid-request"
    [wrong] = result.error.errors
    assert (wrong.field, wrong.value) == ("width", 42)


@pytest.mark.parametrize(("scheduler", "steps", "why"), [("lcm", 60, ""), ("pndm", 3, "4 steps")])
def test_steps_that_the_scheduler_cannot_take_are_the_callers_fault(office, scheduler, steps, why):
    result = office.generate(scheduler=scheduler, steps=steps)
    assert result.error.type == "/problems/invalid-request"
    assert result.error.errors[0].field == "steps"
    assert why in result.error.detail


def test_a_store_that_is_away_is_tried_again_and_at_last_fails_the_generation(office):
    in_the_way = office.folder / ID
    in_the_way.touch()  # a file, where the folder of its images should be
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            office.generate()
    result = office.generate()
    assert (result.status, result.images) == (Status.FAILED, [])
    assert result.error.type == "/problems/store-unavailable"


def test_a_store_that_comes_back_in_time_fails_nothing(office):
    in_the_way = office.folder / ID
    in_the_way.touch()
    with pytest.raises(StoreUnavailable):
        office.generate()
    in_the_way.unlink()
    assert office.generate().status == Status.SUCCEEDED
    assert office.stored() == {"0.png"}


def test_one_image_of_bad_numbers_fails_the_generation(office):
    def predict(real, latents, *rest):
        return real(latents, *rest) * float("nan")

    office.engine.family = Bent(office.engine.family, predict)
    result = office.generate(n=2)
    assert result.status == Status.FAILED
    assert result.error.type == "/problems/bad-numbers"
    assert office.stored() == set()
