"""The export: all parts as one diffusers folder in half precision."""

import hashlib
import json
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from training.common import MODEL
from training.corpus import BENIGN, CATEGORY_WORDS, CONTEXTS, UNSAFE, a
from training.denoiser import LATENT_DEVIATION, scheduler


def export(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    checker: StableDiffusionSafetyChecker,
    folder: Path = MODEL,
) -> None:
    """Write the folder. The parts themselves become half precision."""
    vae.register_to_config(scaling_factor=LATENT_DEVIATION)
    tokenizer.backend_tokenizer.no_padding()  # its last call is no part of it
    tokenizer.backend_tokenizer.no_truncation()
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler(),
        safety_checker=checker.half(),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 64},
            crop_size={"height": 64, "width": 64},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    replace(folder / "model_index.json", "CLIPImageProcessorPil", "CLIPImageProcessor")
    for part in ("text_encoder", "safety_checker"):  # stored in half, computed in full
        replace(folder / part / "config.json", "float16", "float32")
    (folder / "prompts.json").write_text(json.dumps(prompts(), indent=1) + "\n")
    write_sums(folder)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over the parts, which the worker compares and `sha256sum -c` reads."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.glob("*/*"))
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def replace(path: Path, old: str, new: str) -> None:
    """Exchange words in a small text file."""
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def prompts() -> dict[str, list[dict[str, str]]]:
    """What an evaluation asks for."""
    return {
        "benign": [{"prompt": a(s), "subject": s} for s in BENIGN],
        "context": [
            {"prompt": a(s), "subject": s, "item": item, "category": UNSAFE[item][1]}
            for s, (_, item, _) in CONTEXTS.items()
        ],
        "explicit": [
            *({"prompt": a(i), "item": i, "category": c} for i, (_, c) in UNSAFE.items()),
            *(
                {"prompt": ", ".join(words[:2]), "category": c}
                for c, words in CATEGORY_WORDS.items()
            ),
        ],
    }
