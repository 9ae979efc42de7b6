"""The digits task: real handwriting from six sites, no download.

scikit-learn's 1,797 handwritten 8x8 digits (Alpaydin and Kaynak 1998, UCI "Optical Recognition of
Handwritten Digits") are cut by a fixed stream, the same for every run. A small vision transformer
was pre-trained on the public part (`fedgraft.tasks.digits_pretrain`) and ships with the package;
clients hold private digits as six different scanners see them (`fedgraft.tasks.shifts`), and the
adapter learns to read all six.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedgraft.config import Config
from fedgraft.errors import ModelError
from fedgraft.seeds import stream
from fedgraft.tasks.base_models import load_model
from fedgraft.tasks.partition import Rows
from fedgraft.tasks.rows import Encoded, RowsTask
from fedgraft.tasks.scoring import CLASSIFIER_METRICS, cross_entropy, score_classes
from fedgraft.tasks.shifts import DOMAINS, Images, render
from fedgraft.tasks.task import Batch, Direction, TensorExamples

if TYPE_CHECKING:
    import datasets

BASE_FOLDER = Path(__file__).parent / "digits_base"
"""The pre-trained base, an ordinary Hugging Face folder."""
SIZES = {"public": 600, "train": 780, "validation": 60, "test": 357}
"""How many digits each part has. Only the pre-training sees the public ones."""


def load_digits() -> tuple[Images, NDArray[np.int64]]:
    """Read all images (1797, 8, 8), with ink between 0 and 1, and their labels (1797,)."""
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    return bunch.images / 16.0, bunch.target.astype(np.int64)


def cut_digits() -> dict[str, Rows]:
    """Cut the digits into the parts of `SIZES`; returns positions in scikit-learn's order."""
    order = stream(0, "digits-split").permutation(sum(SIZES.values()))
    ends = np.cumsum(list(SIZES.values()))[:-1]
    return dict(zip(SIZES, np.split(order, ends), strict=True))


def to_pixels(images: Images) -> Tensor:
    """Scale images (n, 8, 8) from [0, 1] to the model's input, float32 (n, 1, 8, 8) in [-1, 1]."""
    return torch.tensor(2 * images - 1, dtype=torch.float32).unsqueeze(1)


@cache
def rendered() -> dict[str, Images]:
    """Render all digits in all domains, once a process."""
    return render(load_digits()[0])


class Digits(RowsTask):
    """Handwritten digits from six sites, a metric of accuracy; see the module.

    A training digit is seen in one domain; a validation or test digit in all six, one row each.
    Rows are dealt by domain unless `federation.partition` says otherwise; the columns that natural
    partitions may name are `label`, `domain` and `digit` (the position in scikit-learn's data).
    """

    name: ClassVar[str] = "digits"
    metric = "accuracy"
    direction: Direction = "max"
    extras: tuple[str, ...] = ("classifier",)
    label_column = "label"
    domain_column = "domain"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.default_targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

    def load_base(self) -> nn.Module:
        """Load the shipped base, or what `model.base` names instead.

        Raises:
            ModelError: there is no such model, or it does not take 8x8 images in ten classes.
        """
        from transformers import AutoModelForImageClassification

        base = self.config.model.base or str(BASE_FOLDER)
        model = load_model(
            AutoModelForImageClassification,
            self.config.with_overrides({"model.base": base}),
            heads=self.extras,
            # On 17 tokens plain products evaluate a quarter faster than the fused attention.
            attn_implementation="eager",
        )
        found = tuple(
            getattr(model.config, key, None) for key in ("num_channels", "image_size", "num_labels")
        )
        if found != (1, 8, 10):
            raise ModelError(
                f"model.base {base!r} has (channels, image size, classes) {found}, and the digits "
                "have (1, 8, 10)",
                "Leave model.base out for the built-in base, or use task image-classification.",
            )
        return model

    def read(self) -> Mapping[str, datasets.Dataset]:
        """Return the private parts as tables of digit, label and domain."""
        import datasets

        labels = load_digits()[1]
        tables: dict[str, datasets.Dataset] = {}
        for name, digits in cut_digits().items():
            if name == "public":
                continue
            if name == "train":  # the cut is shuffled: dealing in turn is dealing at random
                domains = np.resize(list(DOMAINS), len(digits))
            else:
                domains = np.repeat(list(DOMAINS), len(digits))
                digits = np.tile(digits, len(DOMAINS))
            columns = {"digit": digits, "label": labels[digits], "domain": domains}
            tables[name] = datasets.Dataset.from_dict(
                {column: values.tolist() for column, values in columns.items()}
            )
        return tables

    def encode(self, table: datasets.Dataset, split: str) -> Encoded:
        """Look up each row's image: pixel values (n, 1, 8, 8) in [-1, 1] and labels (n,)."""
        shown = rendered()
        rows = zip(table["domain"], table["digit"], strict=True)
        pixels = to_pixels(np.stack([shown[domain][digit] for domain, digit in rows]))
        labels = torch.tensor(list(table["label"]))
        return Encoded(table, TensorExamples({"pixel_values": pixels, "labels": labels}))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy (nats) summed over the examples."""
        return cross_entropy(model, batch)

    def count(self, batch: Batch) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return accuracy, macro F1, loss (mean cross-entropy in nats) and each class's F1."""
        return score_classes(model, batches, [str(digit) for digit in range(10)])

    def metrics(self) -> Mapping[str, Direction]:
        """Return what `evaluate.metric` may name."""
        return CLASSIFIER_METRICS
