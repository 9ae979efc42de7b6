"""The image-classification task: folders of images, with any image classifier of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.errors import DataError, ModelError
from fedgraft.tasks.base_models import load_image_processor
from fedgraft.tasks.classification import Classification
from fedgraft.tasks.folders import NAMES
from fedgraft.tasks.rows import Encoded
from fedgraft.tasks.splits import data_source, existing
from fedgraft.tasks.task import Batch

if TYPE_CHECKING:
    import datasets

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
KEPT_BYTES = 2**30
"""Bytes of decoded images that each split keeps in memory; others are decoded when asked for."""


class ImageClassification(Classification):
    """Images in folders that name their classes.

    `task.data` holds `class/image.png`, or `domain/class/image.png` for data from several domains
    (then the default partition is by domain); or such folders under `train`, and where there are
    any `validation` (or `valid`, `val`, `dev`) and `test`. Files of other kinds are passed over.
    """

    name: ClassVar[str] = "image-classification"

    @property
    def label_column(self) -> str:
        """The column with the name of each image's folder."""
        return "label"

    @property
    def domain_column(self) -> str | None:
        """The column with the name of the folder above, where the images lie that deep."""
        return "domain" if "domain" in self.tables["train"].column_names else None

    @staticmethod
    def auto_class() -> Any:
        """Return AutoModelForImageClassification."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def read(self) -> Mapping[str, datasets.Dataset]:
        """List the images of each split.

        Raises:
            DataError: no folder, no images, or images at different depths.
        """
        import datasets

        made: dict[str, datasets.Dataset] = {}
        for name, folder in self._folders().items():
            images = _images(folder)
            made[name] = datasets.Dataset.from_dict(
                {
                    "image": [str(path) for path in images],
                    "label": [path.parent.name for path in images],
                }
            )
            if _depth(folder, images) == 2:
                domains = [path.parent.parent.name for path in images]
                made[name] = made[name].add_column("domain", domains)
        return made

    def encode(self, table: datasets.Dataset, split: str) -> Encoded:
        """Open every image, and decode none yet.

        Raises:
            DataError: a file that is no image, or a label that no training row has.
        """
        paths = [Path(path) for path in table["image"]]
        for path in paths:
            _check_header(path)
        return Encoded(table, Images(paths, self.targets(table, split), self.pixels))

    def pixels(self, path: Path) -> Tensor:
        """Decode one image into what the base takes, float32 (channels, height, width).

        The base's own image processor prepares it; without one the image is resized to the base's
        `image_size` and scaled to [-1, 1]. Grey or colour is the base's choice (`num_channels`).

        Raises:
            DataError: the image is broken.
        """
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert("L" if self._grey else "RGB")
        except _BROKEN as error:
            raise _broken(path, error) from None
        if self._processor is not None:
            return cast(
                Tensor, self._processor(images=[image], return_tensors="pt")["pixel_values"][0]
            )
        size = self.base_config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(resized, dtype=np.float32)).reshape(height, width, -1)
        return (values / 127.5 - 1).permute(2, 0, 1).contiguous()

    @cached_property
    def _grey(self) -> bool:
        channels = getattr(self.base_config, "num_channels", 3)
        if channels not in (1, 3):
            raise ModelError(
                f"model.base {self.config.model.base!r} takes images of {channels} channels",
                "Choose a base for grey (1) or colour (3) images.",
            )
        return bool(channels == 1)

    def preparation(self) -> tuple[Any, ...]:
        """Return the base's image processor, where it brings one."""
        return () if self._processor is None else (self._processor,)

    @cached_property
    def _processor(self) -> Any:
        processor = load_image_processor(self.config)
        if processor is not None and self._grey:
            # transformers refuses three means for one channel; a grey pixel's is their average.
            for name in ("image_mean", "image_std"):
                setattr(processor, name, [float(np.mean(getattr(processor, name)))])
        return processor

    def _folders(self) -> dict[str, Path]:
        root = existing(Path(data_source(self.config)).expanduser())
        if not root.is_dir():
            raise DataError(
                f"task.data is {str(root)!r}, a file and not a folder of images",
                "Name a folder with one folder of images for each class.",
            )
        found = {
            name: root / alias
            for name, aliases in NAMES.items()
            for alias in aliases
            if (root / alias).is_dir()
        }
        return found if "train" in found else {"train": root}


@dataclass
class Images:
    """Image files, decoded when first asked for and kept as long as `KEPT_BYTES` allow.

    Attributes:
        paths: the files.
        labels: their classes, (n,).
        decode: makes a file into (channels, height, width).
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    decode: Callable[[Path], Tensor]
    _kept: dict[int, Tensor] = field(default_factory=dict)
    _kept_bytes: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate: pixel_values (n, channels, height, width), labels (n,)."""
        return {
            "pixel_values": torch.stack([self._pixels(int(index)) for index in indices]),
            "labels": torch.from_numpy(self.labels[indices]),
        }

    def _pixels(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        pixels = self.decode(self.paths[index])
        if self._kept_bytes + pixels.nbytes <= KEPT_BYTES:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels


_BROKEN = (OSError, SyntaxError, ValueError)
"""What Pillow raises for a file that is no image, is cut short or breaks its format."""


def _images(folder: Path) -> list[Path]:
    """Return the images below a folder, sorted."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise DataError(
            f"folder {folder} holds no images",
            f"Put images ({', '.join(sorted(SUFFIXES))}) in one folder for each class.",
        )
    return found


def _depth(root: Path, images: Sequence[Path]) -> int:
    """Return 1 for class/image, 2 for domain/class/image."""
    depths = {path: len(path.relative_to(root).parts) - 1 for path in images}
    first = depths[images[0]]
    for path, depth in depths.items():
        if depth not in (1, 2) or depth != first:
            raise DataError(
                f"{path} is not where an image is expected below {root}",
                "Lay all images out as class/image, or all as domain/class/image.",
            )
    return first


def _check_header(path: Path) -> None:
    """Refuse early what is no image; the pixels are read when they are needed."""
    from PIL import Image

    try:
        with Image.open(path):
            pass
    except _BROKEN as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(f"image {path} cannot be read: {error}", "Mend or delete that file.")
