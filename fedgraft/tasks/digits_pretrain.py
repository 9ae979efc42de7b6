"""How the base of the digits task was made: `python -m fedgraft.tasks.digits_pretrain --to FOLDER`.

A small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) learns the public digits,
upright and clean, in about a minute on one core. The result ships in `digits_base`: training it
anew gives other bits on another machine, and then no two clients would share a base.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedgraft.seeds import forked_torch, stream, torch_seed
from fedgraft.tasks.digits import cut_digits, load_digits, to_pixels

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

STEPS = 1500
BATCH = 64
PEAK_LR = 1.5e-3
SEED = 0


def architecture() -> ViTForImageClassification:
    """Return the untrained model: 2 layers of width 64, 16 patches of 2x2 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            patch_size=2,
            image_size=8,
            num_channels=1,
            id2label={digit: str(digit) for digit in range(10)},
            label2id={str(digit): digit for digit in range(10)},
            hidden_act="gelu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def augment(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Turn (12 degrees), scale (10 per cent) and move (half a pixel) images (n, 1, 8, 8)."""
    count = len(pixels)
    angle = torch.tensor(random.uniform(-1, 1, count) * np.deg2rad(12), dtype=torch.float32)
    scale = torch.tensor(random.uniform(0.9, 1.1, count), dtype=torch.float32)
    moves = torch.tensor(random.uniform(-0.125, 0.125, (count, 2)), dtype=torch.float32)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    maps = torch.stack(
        [torch.stack([cos, -sin, moves[:, 0]], 1), torch.stack([sin, cos, moves[:, 1]], 1)], 1
    )
    grid = functional.affine_grid(maps, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def pretrain() -> ViTForImageClassification:
    """Train the base on the public digits: AdamW under a one-cycle schedule, one thread."""
    torch.set_num_threads(1)
    images, labels = load_digits()
    public = cut_digits()["public"]
    pixels, targets = to_pixels(images[public]), torch.tensor(labels[public])
    random = stream(SEED, "digits-pretrain")
    with forked_torch(torch_seed(SEED, "digits-init"), torch.device("cpu")):
        model = architecture()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        rows = torch.from_numpy(random.integers(0, len(public), BATCH))
        logits = model(pixel_values=augment(pixels[rows], random)).logits
        loss = functional.cross_entropy(logits, targets[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def main() -> None:
    """Train the base, write it, and print the hash of its weights."""
    parser = argparse.ArgumentParser(description="Pre-train the base of the digits task.")
    parser.add_argument("--to", type=Path, required=True, help="folder to write the model to")
    folder: Path = parser.parse_args().to
    pretrain().save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)  # safetensors writes for its owner alone
    print(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights}")


if __name__ == "__main__":
    main()
