"""The digits task: real handwriting from six sites, no download.

scikit-learn's 1,797 handwritten 8x8 digits (Alpaydin and Kaynak 1998, UCI "Optical Recognition of
Handwritten Digits") are cut by a fixed stream, the same for every run. A small vision transformer
was pre-trained on the public part (`fedgraft.tasks.digits_pretrain`) and ships with the package;
clients hold private digits as six different scanners see them (`fedgraft.tasks.shifts`), and the
adapter learns to read all six.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedgraft.config import Config
from fedgraft.errors import ConfigError, ModelError
from fedgraft.seeds import stream
from fedgraft.tasks.partition import Rows, deal, domains_of, kind, validation_like
from fedgraft.tasks.shifts import DOMAINS, render
from fedgraft.tasks.task import Batch, Task, TensorExamples

if TYPE_CHECKING:
    import datasets

BASE_FOLDER = Path(__file__).parent / "digits_base"
"""The pre-trained base, an ordinary Hugging Face folder."""
SIZES = {"public": 600, "train": 780, "validation": 60, "test": 357}
"""Digits in each split, before validation and test are shown through every domain."""


@dataclass(frozen=True)
class Split:
    """Images (n, 8, 8) between 0 and 1, labels (n,), domain numbers (n,), source digits (n,)."""

    images: NDArray[np.float64]
    labels: NDArray[np.int64]
    domains: NDArray[np.int64]
    sources: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int | None) -> Split:
        """Return the first `count` rows; all for None."""
        return Split(*(array[:count] for array in vars(self).values()))

    def table(self) -> datasets.Dataset:
        """Return the columns by which rows can be dealt: label, domain."""
        import datasets

        return datasets.Dataset.from_dict(
            {"label": self.labels.tolist(), "domain": self.domains.tolist()}
        )

    def examples(self) -> TensorExamples:
        """Return what the model takes: pixel values (n, 1, 8, 8) in [-1, 1], labels (n,)."""
        pixels, labels = to_pixels(self.images), torch.tensor(self.labels)
        return TensorExamples({"pixel_values": pixels, "labels": labels})


def to_pixels(images: NDArray[np.float64]) -> Tensor:
    """Scale images (n, 8, 8) from [0, 1] to the model's float32 input (n, 1, 8, 8) in [-1, 1]."""
    return torch.tensor(2 * images - 1, dtype=torch.float32).unsqueeze(1)


def cut() -> dict[str, Rows]:
    """Cut the digits into the four splits of `SIZES`: positions in scikit-learn's order."""
    order = stream(0, "digits-split").permutation(sum(SIZES.values()))
    ends = np.cumsum(list(SIZES.values()))[:-1]
    return dict(zip(SIZES, np.split(order, ends), strict=True))


def load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read all images (1797, 8, 8), between 0 and 1, and their labels (1797,)."""
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    return bunch.images / 16.0, bunch.target.astype(np.int64)


@cache
def splits() -> dict[str, Split]:
    """Read and render the private splits: train (one domain a row), validation, test (all six)."""
    images, labels = load_digits()
    shown = render(images)
    made: dict[str, Split] = {}
    for name, sources in cut().items():
        if name == "public":
            continue
        if name == "train":  # the cut is already shuffled, so dealing in turn is dealing at random
            domains = np.arange(len(sources)) % len(DOMAINS)
        else:
            domains = np.repeat(np.arange(len(DOMAINS)), len(sources))
            sources = np.tile(sources, len(DOMAINS))
        made[name] = Split(shown[domains, sources], labels[sources], domains, sources)
    return made


class Digits(Task):
    """Handwritten digits from six sites; see the module."""

    name: ClassVar[str] = "digits"
    metric: ClassVar[str] = "accuracy"
    direction: ClassVar[Literal["max", "min"]] = "max"
    default_targets: ClassVar[list[str] | Literal["all-linear"]] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "fc1",
        "fc2",
    ]
    extras: ClassVar[tuple[str, ...]] = ("classifier",)

    def load_base(self) -> nn.Module:
        """Load the shipped base, or a ViT of the same input and classes named by `model.base`.

        Raises:
            ModelError: there is no such model, or it does not take 8x8 images in ten classes.
        """
        from transformers import ViTForImageClassification

        wanted = self.config.model
        source = wanted.base or str(BASE_FOLDER)
        try:
            # On 17 tokens a plain product evaluates faster than the fused attention kernel.
            model, loading = ViTForImageClassification.from_pretrained(
                source,
                revision=wanted.revision or "main",
                dtype=getattr(torch, wanted.dtype),
                attn_implementation="eager",
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"model.base {source!r} cannot be loaded as a ViT: {str(error).splitlines()[0]}",
                "Name a Hugging Face folder or id, or leave model.base out for the built-in base.",
            ) from error
        if loading["missing_keys"]:
            raise ModelError(
                f"model.base {source!r} lacks weights: {', '.join(sorted(loading['missing_keys']))}",
                "Name a ViT trained for image classification, head included.",
            )
        shape = (model.config.num_channels, model.config.image_size, model.config.num_labels)
        if shape != (1, 8, 10):
            raise ModelError(
                f"model.base {source!r} has {shape[0]} channels, image size {shape[1]} and "
                f"{shape[2]} classes; the digits have 1, 8 and 10",
                "Leave model.base out for the built-in base, or use task image-classification.",
            )
        return cast(nn.Module, model)

    def train(self, client: int | None = None) -> TensorExamples:
        if client is None:
            return self._train.examples()
        return _pick(self._train, self._dealt[self._check(client)])

    def validation(self, client: int | None = None) -> TensorExamples:
        if client is None:
            return splits()["validation"].examples()
        return _pick(splits()["validation"], self._validation[self._check(client)])

    def test(self) -> TensorExamples:
        return splits()["test"].examples()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(_logits(model, batch), batch["labels"], reduction="sum")

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return accuracy (a share) and mean cross-entropy (nats)."""
        right = seen = 0
        loss = 0.0
        for batch in batches:
            logits = _logits(model, batch)
            right += int((logits.argmax(-1) == batch["labels"]).sum())
            loss += float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            seen += len(logits)
        return {"accuracy": right / seen, "loss": loss / seen}

    def describe(self, client: int) -> str:
        how = kind(self.config, "domain")
        rows = self._dealt[self._check(client)]
        if how == "iid":
            return f"{len(rows)} digits of all domains"
        if how == "domain":
            held = domains_of(client, len(self._dealt), len(DOMAINS))
            return "; ".join(list(DOMAINS)[number] for number in held)
        labels, counts = np.unique(self._train.labels[rows], return_counts=True)
        common = labels[np.argsort(-counts, kind="stable")][:3]
        return f"mostly {', '.join(str(label) for label in common)}"

    @cached_property
    def _train(self) -> Split:
        return splits()["train"].head(self.config.task.samples)

    @cached_property
    def _dealt(self) -> list[Rows]:
        return deal(self._train.table(), self.config, label="label", domain="domain")

    @cached_property
    def _validation(self) -> list[Rows]:
        return validation_like(
            splits()["validation"].table(),
            self._train.table(),
            self._dealt,
            self.config,
            label="label",
            domain="domain",
        )

    def _check(self, client: int) -> int:
        if not 0 <= client < len(self._dealt):
            raise ConfigError(
                f"there is no client {client}: federation.clients is {len(self._dealt)}",
                f"Clients are numbered from 0 to {len(self._dealt) - 1}.",
            )
        return client


def _pick(split: Split, rows: Rows) -> TensorExamples:
    return TensorExamples(split.examples().batch(rows))


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(pixel_values=batch["pixel_values"]).logits
    return logits.float()
