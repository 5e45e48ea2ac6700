"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, a U-Net on latents, a VAE.

Reads diffusers' folder layout, by folder or hub id, safetensors only; epsilon and v-prediction.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from torch import Generator, Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safelatent.schema import Model, TextReport
from worker.families import UnusableModel

LOCAL: dict[str, Any] = {"local_files_only": True}

log = logging.getLogger(__name__)

PARTS = (
    "tokenizer",
    "text_encoder",
    "unet",
    "vae",
    "scheduler",
    "safety_checker",
    "feature_extractor",
)
FILES = [f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt", "safetensors")]

SCHEDULERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
"""Names of the contract; each scheduler is what `from_config` makes of the checkpoint's own."""


class StableDiffusion:
    """One checkpoint, warm on one device."""

    def __init__(self, source: str, id: str, device: torch.device, dtype: torch.dtype):
        """Load a folder or a hub id; raises UnusableModel with a sentence for the operator."""
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.device, self.dtype = device, dtype
        self.folder, revision = find(source)
        self.tokenizer = self._load(CLIPTokenizer, "tokenizer")
        self._tokenizing = threading.Lock()  # Rust's tokenizers refuse two threads at once
        self.text_encoder = self._weights(CLIPTextModel, "text_encoder", dtype=dtype)
        self.unet = self._weights(UNet2DConditionModel, "unet", torch_dtype=dtype)
        self.vae = self._weights(AutoencoderKL, "vae", torch_dtype=dtype)
        self.own_scheduler = self._own_scheduler()
        if device.type == "cpu":
            # oneDNN decodes faster on channels_last. The U-Net gains nothing from it, and there
            # its larger rounding errors are amplified by the guidance and the steps.
            self.vae.to(memory_format=torch.channels_last)
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise UnusableModel(
                f"{source} is no text-to-image model: its U-Net reads "
                f"{self.unet.config.in_channels} channels and its VAE writes "
                f"{self.vae.config.latent_channels}"
            )
        prediction_type = self.own_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UnusableModel(
                f"{source} predicts {prediction_type!r}, not epsilon or v_prediction"
            )
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.max_tokens = min(
            self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings
        )
        side = int(self.unet.config.sample_size) * self.factor
        self.model = Model(
            id=id,
            revision=revision,
            family="stable_diffusion",
            prediction_type=prediction_type,
            width=side,
            height=side,
            size_multiple=self.factor,
            scheduler=self._own_name(),
            max_tokens=self.max_tokens,
        )

    def encode(self, texts: Sequence[str]) -> Tensor:
        with self._tokenizing:
            tokens = self.tokenizer(
                list(texts),
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]  # type: ignore[no-any-return]

    def read(self, text: str) -> TextReport:
        with self._tokenizing:
            tokens: list[int] = self.tokenizer(text, verbose=False).input_ids
        kept = self.max_tokens - 1  # the last one read is the end token
        lost = tokens[kept:-1]
        unknown = self.tokenizer.unk_token_id
        return TextReport(
            text=text,
            tokens=len(tokens),
            dropped=len(lost),
            dropped_text=self.tokenizer.decode(lost).strip() if lost else "",
            unknown=tokens[1:-1].count(unknown),
        )

    def noise(self, generator: Generator, width: int, height: int) -> Tensor:
        shape = (1, self.unet.config.in_channels, height // self.factor, width // self.factor)
        return torch.randn(shape, generator=generator).to(self.device)

    def scheduler(self, name: str, steps: int) -> Any:
        kind, extra = SCHEDULERS[name]
        scheduler = kind.from_config(self.own_scheduler.config, **extra)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def alpha(self, scheduler: Any, timestep: Tensor) -> float:
        if self.model.prediction_type == "epsilon":
            return 1.0
        cumulative = self.own_scheduler.alphas_cumprod
        return float(cumulative[round(float(timestep))].sqrt())

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        latents = latents.to(self.dtype)
        return self.unet(latents, timesteps, embeddings, return_dict=False)[0].float()  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> np.ndarray:
        latents = (latents / self.vae.config.scaling_factor).to(self.dtype)
        pictures = self.vae.decode(latents, return_dict=False)[0].float()
        if not bool(pictures.isfinite().all()):
            raise ValueError("the VAE gave NaN or infinity")
        pictures = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        array: np.ndarray = (pictures * 255).round().to(torch.uint8).cpu().numpy()
        return array

    def _load(self, kind: Any, part: str, **options: Any) -> Any:
        if not (self.folder / part).is_dir():
            raise UnusableModel(f"{self.folder} has no folder {part!r}: it is half a checkpoint")
        try:
            return kind.from_pretrained(
                self.folder, subfolder=part, local_files_only=True, **options
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UnusableModel(f"not enough memory for the {part} of {self.folder}") from error
        except Exception as error:  # transformers, diffusers and safetensors raise many kinds
            said = " ".join(str(error).split())[:300]
            raise UnusableModel(f"cannot read the {part} of {self.folder}: {said}") from error

    def _weights(self, kind: Any, part: str, **options: Any) -> Any:
        folder = self.folder / part
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise UnusableModel(
                f"{folder} has no .safetensors file: pickled weights can run code and are not read"
            )
        model, info = self._load(
            kind, part, use_safetensors=True, output_loading_info=True, **options
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise UnusableModel(
                f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]!r} for one"
            )
        return model.to(self.device).eval().requires_grad_(False)

    def _own_scheduler(self) -> Any:
        path = self.folder / "scheduler" / "scheduler_config.json"
        try:
            name = json.loads(path.read_text())["_class_name"]
            kind = getattr(diffusers, name)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UnusableModel(f"{path} names no scheduler of diffusers: {error}") from error
        return self._load(kind, "scheduler")

    def _own_name(self) -> str:
        """The contract's name of the checkpoint's scheduler; ddim for one that it does not name."""
        own, config = type(self.own_scheduler), self.own_scheduler.config
        for name, (kind, extra) in SCHEDULERS.items():
            if kind is own and all(config.get(key) == value for key, value in extra.items()):
                return name
        log.warning("the checkpoint's %s has no name in the contract: ddim is used", own.__name__)
        return "ddim"


def find(source: str) -> tuple[Path, str]:
    """The folder of a checkpoint and its revision: the hub's commit, or sha256 of the content."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        try:
            return folder, content_hash(folder)
        except OSError as error:
            raise UnusableModel(f"cannot read {error.filename}: {error.strerror}") from error
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise UnusableModel(f"there is no folder {source}, and it is no hub id (owner/name)")
    try:
        got = snapshot_download(source, allow_patterns=FILES, ignore_patterns=["*.fp16.*"])
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise UnusableModel(f"there is no folder {source}, and the hub says: {said}") from error
    return Path(got), Path(got).name


def content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of the files that make the model."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
