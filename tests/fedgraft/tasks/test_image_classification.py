from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_vit

from fedgraft.config import Config
from fedgraft.errors import DataError, ModelError
from fedgraft.tasks import image_classification
from fedgraft.tasks.image_classification import ImageClassification, Images


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def make(base: Path, data: Path, **federation: Any) -> ImageClassification:
    return ImageClassification(
        Config.from_dict(
            {
                "task": {"name": "image-classification", "data": str(data)},
                "model": {"base": str(base)},
                "federation": {"clients": 2} | federation,
            }
        )
    )


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def fill(folder: Path, count: int = 15) -> Path:
    """Write red and blue images, `count` of each."""
    for number in range(count):
        paint(folder / "red" / f"{number:02}.png", (255, 0, number))
        paint(folder / "blue" / f"{number:02}.png", (0, number, 255))
    return folder


def test_class_folders_are_cut(vit: Path, tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "red" / "notes.txt").write_text("passed over")
    task = make(vit, tmp_path)
    assert task.classes == ("blue", "red") and task.extras == ("classifier",)
    assert [len(split) for split in (task.train(), task.validation(), task.test())] == [24, 3, 3]
    batch = task.train().batch(np.arange(24))
    red = batch["pixel_values"][:, 0].mean((1, 2)) > 0
    assert torch.equal(red, batch["labels"] == 1)


def test_split_folders(vit: Path, tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 2), ("test", 3)):
        fill(tmp_path / name, count)
    task = make(vit, tmp_path)
    assert [len(split) for split in (task.train(), task.validation(), task.test())] == [20, 4, 6]
    paint(tmp_path / "test" / "green" / "a.png", (0, 255, 0))
    with pytest.raises(DataError, match=r"the test split .* has the label 'green'"):
        make(vit, tmp_path).test()


def test_pixels_are_scaled_to_one(vit: Path, tmp_path: Path) -> None:
    task = make(vit, fill(tmp_path))
    paint(tmp_path / "wide.png", (255, 51, 0), size=(20, 5))
    pixels = task.pixels(tmp_path / "wide.png")
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
    # 51 / 255 = 0.2, and (0.2 - 0.5) / 0.5 = -0.6; a plain colour stays plain when resized
    for channel, value in zip(pixels, (1.0, -0.6, -1.0), strict=True):
        assert channel.numpy() == pytest.approx(np.full((8, 8), value), abs=1e-6)


def test_rows_and_columns_keep_their_places(vit: Path, tmp_path: Path) -> None:
    task = make(vit, fill(tmp_path))
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    pixels = task.pixels(tmp_path / "ramp.png")
    expected = values / 127.5 - 1
    assert all(channel.numpy() == pytest.approx(expected, abs=1e-6) for channel in pixels)


def test_bases_for_oblong_images(tmp_path: Path) -> None:
    task = make(save_vit(tmp_path / "vit", image_size=(4, 12)), fill(tmp_path / "data"))
    pixels = task.train().batch(np.arange(2))["pixel_values"]
    assert pixels.shape == (2, 3, 4, 12)  # height, width
    task.load_base()(pixel_values=pixels)
    values = np.arange(48, dtype=np.uint8).reshape(4, 12)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    assert task.pixels(tmp_path / "ramp.png")[0].numpy() == pytest.approx(values / 127.5 - 1)


def test_grey_bases(tmp_path: Path) -> None:
    base = save_vit(tmp_path / "vit", num_channels=1)
    task = make(base, fill(tmp_path / "data"))
    paint(tmp_path / "grey.png", (51, 51, 51))
    assert task.pixels(tmp_path / "grey.png").shape == (1, 8, 8)
    assert task.pixels(tmp_path / "grey.png").mean() == pytest.approx(-0.6, abs=1e-6)
    four = save_vit(tmp_path / "four", num_channels=4)
    with pytest.raises(ModelError, match="images of 4 channels"):
        make(four, tmp_path / "data").pixels(tmp_path / "grey.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_of_the_base(tmp_path: Path, channels: int) -> None:
    from transformers import ViTImageProcessor

    base = save_vit(tmp_path / "vit", num_channels=channels)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.2] * 3, image_std=[0.1] * 3).save_pretrained(base)
    task = make(base, fill(tmp_path / "data"))
    paint(tmp_path / "grey.png", (51, 51, 51), size=(12, 12))
    pixels = task.pixels(tmp_path / "grey.png")
    assert pixels.shape == (channels, 8, 8)
    assert pixels.numpy() == pytest.approx(0.0, abs=1e-6)  # 51 / 255 is the mean


def test_loss_is_cross_entropy_summed(vit: Path, tmp_path: Path) -> None:
    task = make(vit, fill(tmp_path))
    model, batch = task.load_base(), task.train().batch(np.arange(5))
    expected = 0.0
    logits = model(pixel_values=batch["pixel_values"]).logits.double().tolist()
    for scores, label in zip(logits, batch["labels"].tolist(), strict=True):
        expected += math.log(sum(map(math.exp, scores))) - scores[label]
    assert task.loss(model, batch).item() == pytest.approx(expected, abs=1e-5)
    assert task.count(batch) == 5
    config: Any = model.config
    assert config.id2label == {0: "blue", 1: "red"}


def test_domains_are_dealt_by_default(vit: Path, tmp_path: Path) -> None:
    for domain in ("photo", "sketch"):
        fill(tmp_path / domain)
    task = make(vit, tmp_path)
    assert task.classes == ("blue", "red")
    assert sorted(task.describe(k) for k in range(2)) == ["photo", "sketch"]
    assert sum(len(task.train(k)) for k in range(2)) == len(task.train()) == 48
    mixed = make(vit, tmp_path, partition="iid")
    assert mixed.describe(0) == ""


def test_layouts_that_do_not_work(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        make(vit, tmp_path / "empty").train()
    with pytest.raises(DataError, match="nothing is there"):
        make(vit, tmp_path / "absent").train()
    fill(tmp_path / "mixed")
    paint(tmp_path / "mixed" / "red" / "deep" / "a.png", (0, 0, 0))
    with pytest.raises(DataError, match=r"a\.png is not where an image is expected"):
        make(vit, tmp_path / "mixed").train()
    paint(tmp_path / "file.png", (0, 0, 0))
    with pytest.raises(DataError, match="a file and not a folder"):
        make(vit, tmp_path / "file.png").train()


def test_broken_images_are_named(vit: Path, tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "red" / "03.png"
    whole = path.read_bytes()
    path.write_text("no image")
    task = make(vit, tmp_path)
    with pytest.raises(DataError, match=r"red/03\.png cannot be read") as caught:
        for split in (task.train, task.validation, task.test):
            split()
    assert caught.value.remedy
    path.write_bytes(whole[: len(whole) - 30])  # the header stands, the pixels are cut short
    with pytest.raises(DataError, match=r"red/03\.png cannot be read"):
        make(vit, tmp_path).pixels(path)


def test_images_are_decoded_once_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def decode(path: Path) -> torch.Tensor:
        decoded.append(path.name)
        return torch.full((1, 2, 2), float(path.name))

    paths = [Path(str(number)) for number in range(3)]
    labels = np.arange(3)
    monkeypatch.setattr(image_classification, "KEPT_BYTES", 2 * 16)  # two of 4 floats each
    images = Images(paths, labels, decode)
    for _ in range(2):
        batch = images.batch(np.array([2, 0, 1]))
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["labels"].tolist() == [2, 0, 1]
    assert decoded == ["2", "0", "1", "1"]
