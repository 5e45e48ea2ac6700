"""Checkpoints that cannot be used say so in one sentence, and those that can have a revision."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.running import EMBEDDED, load
from training.export import write_sums
from worker.families import UnusableModel
from worker.families.files import checksums, content_hash, find, licence
from worker.process import main
from worker.supervisor import UNUSABLE


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def says(folder: Path) -> str:
    with pytest.raises(UnusableModel) as caught:
        load(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said
    return said


def weights(folder: Path, part: str) -> Path:
    [path] = (folder / part).glob("*.safetensors")
    return path


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: apache-2.0\ntags: []\n---\n# A model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: acme-1\n---\n", "acme-1"),
        ("---\ntags: []\n---\nlicense: mit", None),
        ("license: mit", None),
    ],
)
def test_the_licence_is_what_the_model_card_says(tmp_path, card, said):
    assert licence(tmp_path) is None
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == said


def test_a_missing_folder(tmp_path):
    assert "there is no folder" in says(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_not_read(copy, part):
    path = weights(copy, part)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    said = says(copy)
    assert f"/{part} has no .safetensors file: pickled weights can run code" in said


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_half_a_checkpoint_names_the_missing_part(copy, part):
    shutil.rmtree(copy / part)
    assert part in says(copy)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_a_truncated_file_names_its_part(copy, part):
    path = weights(copy, part)
    path.write_bytes(path.read_bytes()[:-1000])
    said = says(copy)
    assert f"{path} is damaged or did not arrive whole" in said
    assert said.endswith("get it again")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_missing_tensor_is_not_made_up(copy, part):
    path = weights(copy, part)
    tensors = load_file(path)
    lost = sorted(tensors)[3]
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    said = says(copy)
    assert "lacks 1 of the model's tensors" in said
    assert lost.removeprefix("text_model.") in said


def test_a_model_that_predicts_the_sample_is_refused(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    assert "predicts 'sample', not epsilon or v_prediction" in says(copy)


def test_a_scheduler_that_is_none_is_refused(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "NoScheduler"}))
    assert "names no scheduler" in says(copy)


def test_an_inpainting_model_is_refused(copy):
    path = weights(copy, "unet")
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    assert "no text-to-image model" in says(copy)


def test_the_revision_is_that_of_the_weights(copy):
    before = content_hash(checksums(copy))
    (copy / "README.md").write_text("A model.")
    (copy / "unet" / "README.md").write_text("A part.")
    assert content_hash(checksums(copy)) == before
    path = weights(copy, "unet")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert content_hash(checksums(copy)) != before
    assert load(copy).model.revision == content_hash(checksums(copy))


def test_renaming_a_part_changes_the_revision(copy):
    before = content_hash(checksums(copy))
    path = weights(copy, "unet")
    path.rename(path.with_name("other.safetensors"))
    assert content_hash(checksums(copy)) != before


def test_a_revision_that_is_asked_for_must_be_the_folder_s(copy, monkeypatch, capsys):
    revision = content_hash(checksums(copy))
    assert find(str(copy), revision) == (copy, revision)
    monkeypatch.setenv("REDIS_URL", "unix:///none.sock")
    monkeypatch.setenv("SAFELATENT_MODEL", str(copy))
    monkeypatch.setenv("SAFELATENT_MODEL_REVISION", "0" * 64)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    assert main() != 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"safelatent worker: the files of {copy} have revision {revision}, and")
    assert said.endswith(f"asks for {'0' * 64}: get that revision, or change the setting")


def test_the_hub_is_asked_for_the_revision(monkeypatch, checkpoint):
    asked = {}

    def download(source: str, **options: object) -> str:
        asked.update(options, source=source)
        return str(checkpoint)

    monkeypatch.setattr("worker.families.files.snapshot_download", download)
    assert find("somebody/model", "abc") == (checkpoint, checkpoint.name)
    assert (asked["source"], asked["revision"]) == ("somebody/model", "abc")


def test_a_file_that_is_not_as_its_sum_says_is_named(copy):
    write_sums(copy)
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=copy).returncode == 0
    (copy / "README.md").write_text("A model.")
    load(copy)
    path = weights(copy, "unet")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = says(copy)
    assert said.startswith(f"{path} is not the file that SHA256SUMS beside it names")
    assert said.endswith("get it again")


def test_the_embedded_model_is_as_its_sums_say():
    listed = EMBEDDED / "SHA256SUMS"
    names = {line.split()[1] for line in listed.read_text().splitlines()}
    assert names == checksums(EMBEDDED).keys()
    assert find(str(EMBEDDED))[0] == EMBEDDED


def test_the_worker_ends_with_the_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "worker"],
        env=os.environ
        | {"REDIS_URL": f"unix://{tmp_path}/none.sock", "SAFELATENT_MODEL": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("safelatent worker: there is no folder /nowhere")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SAFELATENT_DTYPE", "fp8", "SAFELATENT_DTYPE: "),
        ("SAFELATENT_DEVICE", "gpu", "SAFELATENT_DEVICE: 'gpu' cannot be used: "),
        ("SAFELATENT_DEVICE", "xpu:3", "SAFELATENT_DEVICE: 'xpu:3' cannot be used: "),
    ],
)
def test_a_wrong_setting_ends_the_worker_with_its_name(monkeypatch, capsys, name, value, said):
    monkeypatch.setenv("REDIS_URL", "unix:///none.sock")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    assert main() == UNUSABLE
    assert f"safelatent worker: {said}" in capsys.readouterr().err
