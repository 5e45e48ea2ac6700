"""Stable Diffusion 1.x and 2.x: a CLIP text encoder, a U-Net on latents, a VAE.

Reads diffusers' folder layout, by folder or hub id, safetensors only; epsilon and v-prediction.
"""

import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Generator, Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safelatent.schema import Model, TextReport
from worker.families import UnusableModel, files

log = logging.getLogger(__name__)

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

    def __init__(
        self,
        source: str,
        id: str,
        device: torch.device,
        dtype: torch.dtype,
        revision: str | None = None,
    ):
        """Load a folder or a hub id; raises UnusableModel with a sentence for the operator.

        `revision`, when given, is the only one that is loaded; see `files.find`.
        """
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.device, self.dtype = device, dtype
        self.folder, found = files.find(source, revision)
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
            revision=found,
            family="stable_diffusion",
            prediction_type=prediction_type,
            width=side,
            height=side,
            size_multiple=self.factor,
            scheduler=self._own_name(),
            max_tokens=self.max_tokens,
            license=files.licence(self.folder),
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
            encoding = self.tokenizer(text, verbose=False)
        tokens: list[int] = encoding.input_ids
        kept = self.max_tokens - 1  # the last one read is the end token
        lost = tokens[kept:-1]
        pieces: dict[int, list[str]] = {}
        for token, word in zip(encoding.tokens(), encoding.word_ids(), strict=True):
            if word is not None:
                pieces.setdefault(word, []).append(token.removesuffix("</w>"))
        return TextReport(
            text=text,
            tokens=len(tokens),
            dropped=len(lost),
            dropped_text=self.tokenizer.decode(lost).strip() if lost else "",
            unknown=sum(map(self._is_unknown, pieces.values())),
        )

    def _is_unknown(self, pieces: list[str]) -> bool:
        """Whether a word, given as its tokens, is one that the vocabulary does not know.

        It has the unknown token, or is in pieces of which most are single letters or bytes. Words
        cut into longer pieces are ordinary: on CLIP's own vocabulary 1.7 % of the words of COCO's
        captions are cut, and none of 22,518 is unknown.
        """
        letters = sum(len(piece) == 1 for piece in pieces)
        return self.tokenizer.unk_token in pieces or (len(pieces) > 1 and 2 * letters > len(pieces))

    def noise(self, generator: Generator, width: int, height: int) -> Tensor:
        shape = (1, self.unet.config.in_channels, height // self.factor, width // self.factor)
        return torch.randn(shape, generator=generator).to(self.device)

    def scheduler(self, name: str, steps: int) -> Any:
        kind, extra = SCHEDULERS[name]
        scheduler = kind.from_config(self.own_scheduler.config, **extra)
        if name == "pndm" and not scheduler.config.skip_prk_steps and steps < 4:
            raise ValueError("its Runge-Kutta start needs 4 steps or more")
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
