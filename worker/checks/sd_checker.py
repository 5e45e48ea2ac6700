"""diffusers' own safety checker, with every score in the open instead of one bool."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessorPil

from safelatent.schema import Check
from worker.families import UnusableModel

SPECIAL_CARE = 0.01
"""A picture with a special-care concept is judged this much more strictly, as by diffusers."""


class SDChecker:
    """The `safety_checker` of a checkpoint: cosines to concepts, a threshold each.

    `config.json` may name its 17 concepts as `concept_names`, with null for slots that are not in
    use; published checkpoints do not, and theirs are called concept_0 and so on.
    """

    name = "sd_checker"

    def __init__(
        self,
        model: StableDiffusionSafetyChecker,
        processor: CLIPImageProcessorPil,
        version: str,
        concept_names: Sequence[str | None],
    ):
        self.model = model
        self.processor = processor
        self.version = version
        self.concept_names = concept_names

    @classmethod
    def of(cls, checkpoint: Path, version: str, device: torch.device) -> "list[SDChecker]":
        """The checker of a checkpoint's folder, in fp32; none when the checkpoint brings none.

        A checker that is there and cannot be read makes the checkpoint unusable.
        """
        folder = checkpoint / "safety_checker"
        if not folder.is_dir():
            return []
        try:
            loaded: Any = StableDiffusionSafetyChecker.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"it lacks {sorted(info['missing_keys'])}")
            names = json.loads((folder / "config.json").read_text()).get("concept_names")
            processor = CLIPImageProcessorPil.from_pretrained(checkpoint / "feature_extractor")
        except Exception as error:
            raise UnusableModel(
                f"cannot read the safety checker of {checkpoint}: {error}"
            ) from error
        names = names or [f"concept_{i}" for i in range(len(model.concept_embeds))]
        return [cls(model.float().to(device).eval(), processor, version, names)]

    @torch.inference_mode()
    def judge(self, pictures: Sequence[np.ndarray]) -> list[Check]:
        pixels = self.processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
        model = self.model
        device = model.visual_projection.weight.device
        pooled = model.vision_model(pixels.pixel_values.to(device))[1]
        embeddings = model.visual_projection(pooled)
        care = _cosines(embeddings, model.special_care_embeds) > model.special_care_embeds_weights
        strictness = SPECIAL_CARE * care.any(dim=1, keepdim=True)
        scores = _cosines(embeddings, model.concept_embeds)
        thresholds = model.concept_embeds_weights - strictness
        return [
            self._verdict(row, limits)
            for row, limits in zip(scores.tolist(), thresholds.tolist(), strict=True)
        ]

    def _verdict(self, scores: list[float], thresholds: list[float]) -> Check:
        named = [
            (name, score, threshold)
            for name, score, threshold in zip(self.concept_names, scores, thresholds, strict=True)
            if name is not None
        ]
        return Check(
            check=self.name,
            version=self.version,
            # not(<=) and not (>): a score of NaN flags
            flagged=any(not score <= threshold for _, score, threshold in named),
            scores={name: score for name, score, _ in named},
            thresholds={name: threshold for name, _, threshold in named},
        )


def _cosines(pictures: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    """[pictures, concepts]"""
    normalise = torch.nn.functional.normalize
    return normalise(pictures) @ normalise(concepts).T
