"""The start-up self-test: a model that does not do what it should is never served."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.worker.running import Bent, load
from worker import guidance, self_test
from worker.engine import Engine
from worker.families import UnusableModel
from worker.families.stable_diffusion import StableDiffusion


def test_a_sound_model_passes(family: StableDiffusion, v_checkpoint: Path) -> None:
    self_test.run(Engine(family))
    self_test.run(Engine(load(v_checkpoint)))


def test_guidance_with_its_sign_flipped_is_refused(family: StableDiffusion, monkeypatch) -> None:
    def flipped(e_0: Tensor, e_p: Tensor, gamma: Tensor, s_g: Tensor) -> Tensor:
        return e_0 + s_g * (e_p - e_0 + gamma)

    monkeypatch.setattr(guidance, "safe", flipped)
    with pytest.raises(UnusableModel, match="does not steer tiny away .* cosine .* -1.00"):
        self_test.run(Engine(family))


def test_guidance_that_does_nothing_is_refused(family: StableDiffusion, monkeypatch) -> None:
    monkeypatch.setattr(guidance, "gamma", lambda mu, e_0, e_S, s_m, nu: torch.zeros_like(e_0))
    with pytest.raises(UnusableModel, match="safety does not act with tiny"):
        self_test.run(Engine(family))


def test_guidance_that_acts_without_a_reason_is_refused(family, monkeypatch) -> None:
    monkeypatch.setattr(guidance, "mu", lambda d, s_S, lam: torch.ones_like(d))
    with pytest.raises(UnusableModel, match="where safety has nothing to do"):
        self_test.run(Engine(family))


def test_a_model_whose_rows_see_each_other_is_refused(family: StableDiffusion) -> None:
    def mixed(predict, latents: Tensor, *rest: Tensor) -> Tensor:
        return predict(latents, *rest) * (1 + 0.01 * len(latents))

    with pytest.raises(UnusableModel, match="tiny is not reproducible here"):
        self_test.run(Engine(Bent(family, mixed)))


def test_numbers_that_are_not_finite_are_refused(family: StableDiffusion) -> None:
    def nan(predict, latents: Tensor, *rest: Tensor) -> Tensor:
        return predict(latents, *rest) * float("nan")

    with pytest.raises(UnusableModel, match="cannot make a picture: .*NaN"):
        self_test.run(Engine(Bent(family, nan)))


def test_the_folders_numbers_hold_for_its_own_revision(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "tiny")
    self_test.write(folder)
    path = folder / self_test.FILE
    written = json.loads(path.read_text())
    model = load(folder)
    assert model.model.revision == written["revision"]  # the file is no part of the revision
    self_test.run(Engine(model))

    path.write_text(json.dumps(written | {"safe": [-x for x in written["safe"]]}))
    with pytest.raises(UnusableModel, match="does not give the image 'safe'"):
        self_test.run(Engine(model))
    path.write_text(json.dumps(written | {"revision": "another", "safe": []}))
    self_test.run(Engine(model))
    for broken in ("{}", "no json", json.dumps(written | {"off": ["x"]})):
        path.write_text(broken)
        with pytest.raises(UnusableModel, match="cannot read .*self_test.json"):
            self_test.run(Engine(model))


def test_the_embedded_model_passes() -> None:
    self_test.run(Engine(load(Path(__file__).parents[2] / "models" / "emoji_scenes")))
