"""The denoiser: a U-Net that says which noise was added to a latent.

That is all of diffusion training: take a latent, add a known amount of noise, ask for the noise,
square the error. The caption enters twice, pooled and added to the embedding of time (which steers
every block), and by cross-attention in the middle. One caption in ten is empty: the difference
between both answers is what guidance enlarges.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from training.common import WORK, Training, corpus, record, save_atomically, to_unit
from training.text_encoder import WIDTH, encode

STEPS, BATCH = 14_000, 32
LATENT_DEVIATION = 0.15
"""Latents are scaled to this deviation: the smaller it is, the later (at less noise) it is decided
what a picture shows, and the levels of safety guidance, whose warm-up counts steps, are made for
decisions that are not over at once.
"""


def build(channels: tuple[int, ...] = (64, 128, 192)) -> UNet2DConditionModel:
    """Resolutions 16, 8 and 4; convolutions only, but for the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    ).to(memory_format=torch.channels_last)


def scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion 1.x, and the sampler that this service starts from."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@torch.no_grad()
def encodings(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Each distinct caption's hidden states once, and for each picture the row of its caption."""
    row = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    distinct, states = list(row), []
    for start in range(0, len(distinct), 100):
        states.append(encode(encoder, tokenizer, distinct[start : start + 100])[0].half())
    return torch.cat(states), torch.tensor([row[c] for c in captions])


@torch.no_grad()
def latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The pictures in the autoencoder's space, scaled."""
    means = []
    for batch in pictures.split(100):
        with torch.autocast("cpu", torch.bfloat16):
            batch = to_unit(batch).contiguous(memory_format=torch.channels_last)
            means.append(vae.encode(batch).latent_dist.mean.half())
    return torch.cat(means) * LATENT_DEVIATION


def noised(latent: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The latent with the noise that belongs to time t, and that noise."""
    noise = torch.randn_like(latent)
    return scheduler().add_noise(latent, noise, t), noise


@torch.no_grad()
def held_out_error(unet: UNet2DConditionModel, latent: Tensor, states: Tensor) -> dict[str, float]:
    """Mean squared error of the noise at a few times, with the right and with another picture's
    caption.
    """
    torch.manual_seed(0)
    result = {}
    for t in (200, 400, 600, 800):
        noisy, noise = noised(latent, torch.full((len(latent),), t))
        for name, caption in (("right", states), ("wrong", states.roll(1, 0))):
            result[f"{name}_{t}"] = float(F.mse_loss(unet(noisy, t, caption).sample, noise))
    return result


def latest() -> UNet2DConditionModel:
    """The average as the last checkpoint has it, for a look at a training that still runs."""
    average = build()
    state = torch.load(WORK / "denoiser.pt", weights_only=True)
    average.load_state_dict(state["modules"]["average"])
    return average.eval()


def train(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, vae: AutoencoderKL, steps: int = STEPS
) -> UNet2DConditionModel:
    """Train, or go on, or return what is finished: the running average of the weights, which
    samples better.
    """
    average, finished = build(), WORK / "denoiser_finished.pt"
    if finished.exists():
        average.load_state_dict(torch.load(finished, weights_only=True))
        return average.eval()
    prepared = WORK / "latents.pt"
    if not prepared.exists():
        scenes, pictures = corpus()
        states, rows = encodings(encoder, tokenizer, [s.caption for s in scenes])
        save_atomically(
            {"latents": latents(vae, pictures), "states": states, "rows": rows}, prepared
        )
    data = torch.load(prepared, weights_only=True)
    unet = build()
    average.load_state_dict(unet.state_dict())
    average.requires_grad_(False)
    training = Training(
        "denoiser", {"unet": unet, "average": average}, rate=1e-3, steps=steps, fused=True
    )
    for step in training.steps():
        chosen = torch.randint(len(data["latents"]), (BATCH,))
        latent = data["latents"][chosen].float().contiguous(memory_format=torch.channels_last)
        # One time from each 32nd of the schedule: every batch sees all strengths of noise.
        t = (1000 * (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH).long()
        noisy, noise = noised(latent, t)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(noisy, t, data["states"][data["rows"][chosen]].float()).sample
        loss = F.mse_loss(output.float(), noise)
        training.descend(loss)
        # The average forgets the first, bad weights quickly and then moves slowly.
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(average.parameters()), [p.detach() for p in unet.parameters()], 1 - decay
        )
    scenes, pictures = corpus(held_out=True)
    states, rows = encodings(encoder, tokenizer, [s.caption for s in scenes[:500]])
    error = held_out_error(average, latents(vae, pictures[:500]).float(), states[rows].float())
    record("denoiser", error=error, steps=steps, minutes=training.seconds / 60)
    save_atomically(average.state_dict(), finished)
    return average.eval()
