"""The autoencoder: 64 x 64 pictures become 16 x 16 latents of four channels, and come back.

Diffusion in this small space costs a fraction of diffusion in pixels; what the autoencoder blurs,
no denoiser can bring back. It learns on crops first, which are four times cheaper and show it the
same edges, then on whole pictures.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.common import WORK, Training, corpus, record, save_atomically, to_unit

STEPS, CROPS_UNTIL = 4_600, 0.8
KL = 1e-3
"""Weight of the divergence from a normal distribution. It keeps latents small and near each other:
little of it, as sharp pictures matter more. `fold_normalisation` does the rest.
"""


def build() -> AutoencoderKL:
    """Three resolutions (64, 32, 16), one block each, no attention."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error, and the error of the gradients, which keeps outlines and eyes."""
    across = F.l1_loss(output.diff(dim=-1), target.diff(dim=-1))
    down = F.l1_loss(output.diff(dim=-2), target.diff(dim=-2))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * (across + down)


def crops(pictures: Tensor, count: int, size: int) -> Tensor:
    """Random square crops, at any pixel."""
    rows = torch.randint(len(pictures), (count,)).tolist()
    corners = torch.randint(64 - size + 1, (count, 2)).tolist()
    return torch.stack(
        [
            pictures[i, :, y : y + size, x : x + size]
            for i, (y, x) in zip(rows, corners, strict=True)
        ]
    )


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1, inside the VAE's own 1 x 1 convolutions.

    The denoiser adds noise of one strength to all channels: they must be of one size.
    """
    latents = torch.cat([vae.encode(to_unit(p)).latent_dist.mean for p in pictures.split(100)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] /= deviation[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / deviation
    into.bias[4:] -= 2 * deviation.log()  # the second half is log variances
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Peak signal to noise ratio of reconstructions, dB, mean over pictures."""
    values = []
    for batch in to_unit(pictures).split(100):
        error = (vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1) - batch) / 2
        values.append(-10 * error.square().mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(values).mean())


def train(steps: int = STEPS) -> AutoencoderKL:
    """Train, or go on, or return what is finished."""
    vae, finished = build(), WORK / "vae_finished.pt"
    if finished.exists():
        vae.load_state_dict(torch.load(finished, weights_only=True))
        return vae.eval()
    pictures = corpus()[1]
    training = Training("vae", {"vae": vae}, rate=1e-3, steps=steps, betas=(0.9, 0.98))
    for step in training.steps():
        small = step < CROPS_UNTIL * steps
        batch = to_unit(crops(pictures, 16 if small else 8, 32 if small else 64))
        batch = batch.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        loss = (
            reconstruction_loss(output.float(), batch)
            + KL * posterior.kl().mean() / posterior.mean[0].numel()
        )
        training.descend(loss)
    held_out = corpus(held_out=True)[1][:500]
    fold_normalisation(vae, held_out)
    record("vae", psnr_db=psnr(vae, held_out), steps=steps, minutes=training.seconds / 60)
    save_atomically(vae.state_dict(), finished)
    return vae.eval()
