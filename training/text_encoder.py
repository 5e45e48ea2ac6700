"""The text encoder: a small CLIP text tower that learns, from captions alone, what their pictures
show.

Our captions come from recipes, so a label set comes free with each: subject, item, place, category.
Predicting it takes minutes and no pictures, and afterwards the encoder is frozen: the denoiser then
starts with a language that already tells a cat from a dog, and every caption is encoded only once.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.common import WORK, Training, record, save_atomically
from training.corpus import BENIGN, CATEGORIES, CONTEXTS, ITEMS, PLACES, UNSAFE, Scene, sample_scene
from training.tokenizer import FILLERS, POSITIONS

STEPS, BATCH, WIDTH = 400, 64, 192
LABELS = [f"subject:{s}" for s in BENIGN | CONTEXTS] + [f"item:{i}" for i in UNSAFE | ITEMS]
LABELS += [f"place:{p}" for p in PLACES] + [f"category:{c}" for c in CATEGORIES] + ["empty"]


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three layers of width 192."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def labels(scene: Scene) -> Tensor:
    """One 0 or 1 for each label: what the picture shows."""
    true = {
        f"subject:{scene.subject}",
        f"item:{scene.item}",
        f"place:{scene.place}",
        f"category:{scene.category}",
    }
    if not scene.caption:
        true = {"empty"}  # anything may be in it
    return torch.tensor([float(label in true) for label in LABELS])


def with_fillers(caption: str, rng: np.random.Generator) -> str:
    """Sprinkle words without meaning over one caption in three, as people do."""
    words = caption.split(" ")
    for _ in range(int(rng.integers(1, 5)) if caption and rng.random() < 0.33 else 0):
        words.insert(int(rng.integers(len(words) + 1)), FILLERS[rng.integers(len(FILLERS))])
    return " ".join(words)


def encode(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Hidden states (n, positions, width) and the index of each caption's end token."""
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="pt"
    )
    ends = (tokens.input_ids == tokenizer.eos_token_id).int().argmax(dim=1)
    return encoder(tokens.input_ids).last_hidden_state, ends


def train(tokenizer: CLIPTokenizer, steps: int = STEPS) -> CLIPTextModel:
    """Train, or go on, or return what is finished; then freeze."""
    encoder, finished = build(tokenizer), WORK / "text_encoder_finished.pt"
    if finished.exists():
        encoder.load_state_dict(torch.load(finished, weights_only=True))
        return encoder.eval().requires_grad_(False)
    head = nn.Linear(WIDTH, len(LABELS))
    training = Training("text_encoder", {"encoder": encoder, "head": head}, rate=1e-3, steps=steps)
    for step in training.steps():
        rng = np.random.default_rng((3, step))
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        states, ends = encode(encoder, tokenizer, [with_fillers(s.caption, rng) for s in scenes])
        # The denoiser reads every position: the padding must carry the meaning, too.
        later = ends + ((POSITIONS - ends) * torch.rand(BATCH)).long()
        rows = torch.arange(BATCH)
        logits = head(torch.cat([states[rows, ends], states[rows, later]]))
        truth = torch.stack([labels(s) for s in scenes]).repeat(2, 1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / (
            2 * BATCH
        )
        training.descend(loss)
    record("text_encoder", cross_entropy=training.loss, steps=steps, minutes=training.seconds / 60)
    save_atomically(encoder.state_dict(), finished)
    return encoder.eval().requires_grad_(False)
