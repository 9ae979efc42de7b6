import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedgraft.config import Config
from fedgraft.errors import ConfigError, ModelError
from fedgraft.tasks.digits import (
    BASE_FOLDER,
    SIZES,
    Digits,
    cut_digits,
    load_digits,
    rendered,
    to_pixels,
)
from fedgraft.tasks.shifts import DOMAINS, render


def digits(**settings: object) -> Digits:
    return Digits(Config().with_overrides({k.replace("__", "."): v for k, v in settings.items()}))


@pytest.fixture(scope="module")
def task() -> Digits:
    return digits()


@pytest.fixture(scope="module")
def base(task: Digits) -> torch.nn.Module:
    return task.load_base()


def everything(examples) -> dict[str, torch.Tensor]:
    return examples.batch(np.arange(len(examples)))


def rows_of(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """Each example's pixels as bytes, to compare examples by."""
    return [row.numpy().tobytes() for row in batch["pixel_values"]]


def test_importing_the_task_loads_neither_transformers_nor_scikit_learn():
    code = (
        "import sys, fedgraft.tasks.digits as d; from fedgraft.config import Config;"
        "d.Digits(Config());"
        "print([m for m in ('transformers', 'sklearn', 'datasets', 'scipy') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr


def test_the_cut_is_disjoint_complete_and_never_changes():
    parts = cut_digits()
    assert {name: len(part) for name, part in parts.items()} == SIZES
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))
    # The base was trained on this very public part: another cut would leak it into the test split.
    joined = b"".join(part.astype("<i8").tobytes() for part in parts.values())
    assert hashlib.sha256(joined).hexdigest() == (
        "9664349df7ce12d418cb71114ba62e36734f13cd16cf013ace1b84955121e279"
    )


def test_rendered_digits_are_the_same_bits_on_every_machine():
    joined = b"".join(rendered()[name].astype("<f8").tobytes() for name in sorted(DOMAINS))
    assert hashlib.sha256(joined).hexdigest() == (
        "1044e5fad535ec7fd39ca261ce474477a240c878740345d684768194a1a833df"
    )


def test_each_domain_does_to_an_image_what_its_name_says():
    dot = np.zeros((1, 8, 8))
    dot[0, 2, 1] = 1.0
    shown = {name: images[0] for name, images in render(dot).items()}
    assert list(shown) == sorted(shown)  # dealing goes by sorted names: client 0 has the first
    assert np.argwhere(shown["shifted"] == 1.0).tolist() == [[3, 2]]
    mirrored = shown["mirrored"]
    assert np.unravel_index(mirrored.argmax(), (8, 8)) == (2, 6)
    assert mirrored.max() == 58 / 64  # 0.9, to the nearest 1/64
    assert (shown["low contrast"].min(), shown["low contrast"].max()) == (19 / 64, 45 / 64)
    noisy = shown["blurred and noisy"]
    assert len(np.unique(noisy)) > 5 and noisy.min() >= 0.0 and noisy.max() <= 1.0


def test_rotations_are_45_degrees_and_mirror_images_of_each_other():
    bar = np.zeros((1, 8, 8))
    bar[0, 3:5, :] = 1.0  # a level bar through the centre
    shown = render(bar)
    left, right = shown["rotated +45"][0], shown["rotated -45"][0]
    assert np.array_equal(left, right[:, ::-1])
    # +45 is anticlockwise: a level bar rises to the right, and is gone from the other diagonal.
    assert [left[7 - i, i] for i in range(2, 6)] == [1.0] * 4
    assert [left[i, i] for i in (0, 1, 2, 5, 6, 7)] == [0.0] * 6


def test_domains_look_different():
    shown = np.stack([rendered()[name] for name in DOMAINS])
    for one in range(len(DOMAINS)):
        for other in range(one):
            # Two digits of one class differ by 0.165 a pixel on average, two domains by as much.
            assert np.abs(shown[one] - shown[other]).mean() > 0.15


def test_train_shows_a_digit_once_and_the_others_show_it_in_every_domain(task: Digits):
    parts = cut_digits()
    train, test = task.split("train").table, task.split("test").table
    assert sorted(train["digit"]) == sorted(parts["train"])
    assert len(test) == 6 * len(parts["test"]) and len(task.validation()) == 6 * 60
    assert set(zip(test["digit"], test["domain"], strict=True)) == {
        (digit, domain) for digit in parts["test"] for domain in DOMAINS
    }
    labels = load_digits()[1]
    assert list(test["label"]) == labels[np.array(test["digit"])].tolist()
    first = task.test().batch(np.array([0]))
    image = rendered()[test["domain"][0]][[test["digit"][0]]]
    assert torch.equal(first["pixel_values"], to_pixels(image))
    assert first["pixel_values"].shape == (1, 1, 8, 8) and first["labels"].shape == (1,)


def test_clients_hold_one_domain_each_and_nothing_in_common(task: Digits):
    held = [rows_of(everything(task.train(client))) for client in range(6)]
    watched = [rows_of(everything(task.validation(client))) for client in range(6)]
    assert [len(rows) for rows in held] == [130] * 6
    assert [len(rows) for rows in watched] == [60] * 6
    assert [task.describe(client) for client in range(6)] == list(DOMAINS)
    for domain, rows, validation in zip(DOMAINS, held, watched, strict=True):
        images = to_pixels(rendered()[domain])
        own = set(rows_of({"pixel_values": images}))
        assert own.issuperset(rows) and own.issuperset(validation)
    pooled = [row for rows in held for row in rows]
    test = rows_of(everything(task.test()))
    assert sorted(pooled) == sorted(rows_of(everything(task.train())))
    assert not set(pooled) & set(test)
    assert not set(pooled) & {row for rows in watched for row in rows}
    assert not set(rows_of(everything(task.validation()))) & set(test)


def test_the_run_s_seed_does_not_change_the_cut_or_the_domains(task: Digits):
    other = digits(seed=5)
    assert torch.equal(everything(task.test())["labels"], everything(other.test())["labels"])
    mine, theirs = everything(task.train(2)), everything(other.train(2))
    assert torch.equal(mine["pixel_values"], theirs["pixel_values"])


def test_samples_cap_the_training_rows_alone():
    task = digits(task__samples=100, federation__partition="iid", federation__clients=4)
    assert len(task.train()) == 100
    assert [len(task.train(client)) for client in range(4)] == [25] * 4
    assert len(task.test()) == 6 * SIZES["test"]


def test_a_natural_partition_by_label_gives_each_client_one_digit():
    settings = {"partition": "natural", "partition-column": "label", "clients": 10}
    task = digits(**{f"federation__{key}": value for key, value in settings.items()})
    for client in range(10):
        assert set(everything(task.train(client))["labels"].tolist()) == {client}
        assert set(everything(task.validation(client))["labels"].tolist()) == {client}


def test_a_client_that_is_not_there_is_refused(task: Digits):
    with pytest.raises(ConfigError, match="no client 6"):
        task.train(6)


def test_the_base_is_the_one_its_card_describes():
    card = (BASE_FOLDER / "README.md").read_text()
    found = hashlib.sha256((BASE_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert re.findall(r"[0-9a-f]{64}", card) == [found]


def test_the_script_that_made_the_base_builds_the_same_architecture(base: torch.nn.Module):
    from fedgraft.tasks.digits_pretrain import architecture

    fresh = {name: tensor.shape for name, tensor in architecture().state_dict().items()}
    assert {name: tensor.shape for name, tensor in base.state_dict().items()} == fresh
    assert sum(p.numel() for p in base.parameters()) == 69194  # as the card says


def test_the_pre_training_augmentation_is_mild():
    from fedgraft.seeds import stream
    from fedgraft.tasks.digits_pretrain import augment

    pixels = to_pixels(load_digits()[0][:200])
    changed = augment(pixels, stream(0, "test"))
    assert changed.shape == pixels.shape
    moved = (changed - pixels).abs().mean()
    other = (pixels - pixels.roll(1, 0)).abs().mean()
    assert 0.05 < moved / other < 0.7  # something happens, and less than becoming another digit


def test_the_untouched_base_reads_clean_digits_and_few_of_the_domains(
    task: Digits, base: torch.nn.Module
):
    images, labels = load_digits()
    private = np.concatenate([part for name, part in cut_digits().items() if name != "public"])
    clean = {"pixel_values": to_pixels(images[private]), "labels": torch.tensor(labels[private])}
    with torch.no_grad():
        assert task.measure(base, iter([clean]))["accuracy"] > 0.95
        whole = everything(task.test())
        measured = task.measure(base, iter([whole]))
    # The card says 0.396; other arithmetic may tip a few of 2,142 examples.
    assert measured["accuracy"] == pytest.approx(0.396, abs=0.005)


def test_measure_agrees_with_a_count_by_hand_and_with_loss(task: Digits, base: torch.nn.Module):
    examples = task.validation(3)
    batches = [examples.batch(np.arange(i, min(i + 25, 60))) for i in range(0, 60, 25)]
    assert [task.count(batch) for batch in batches] == [25, 25, 10]
    with torch.no_grad():
        measured = task.measure(base, iter(batches))
        right, loss = 0, 0.0
        for i in range(60):
            one = examples.batch(np.array([i]))
            scores = base(pixel_values=one["pixel_values"]).logits[0].double()
            right += int(scores.argmax()) == int(one["labels"])
            loss -= float(scores.log_softmax(0)[one["labels"]])
        summed = sum(float(task.loss(base, batch)) for batch in batches)
    assert measured["accuracy"] == right / 60
    # float32 sums of 60 losses of about 5 nats
    assert measured["loss"] == pytest.approx(loss / 60, rel=1e-5)
    assert summed == pytest.approx(loss, rel=1e-5)


def test_lora_attaches_to_every_layer_named_and_the_head_is_an_extra(task: Digits):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        task.load_base(),
        LoraConfig(r=2, target_modules=task.default_targets, modules_to_save=list(task.extras)),
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("lora_B" in name for name in trained) == 2 * 6  # layers x (q, k, v, o, fc1, fc2)
    assert sum("classifier" in name for name in trained) == 2  # weight, bias
    task.loss(model, task.train(0).batch(np.arange(4))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_another_base_must_take_digits(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, intermediate_size=8, **small)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(3, 16, 2\)"):
        digits(model__base=str(tmp_path)).load_base()
    with pytest.raises(ModelError, match="not there"):
        digits(model__base="./nowhere").load_base()


def test_the_base_loads_in_the_dtype_asked_for():
    model = digits(model__dtype="bfloat16").load_base()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    task = digits()
    with torch.no_grad():
        loss = task.loss(model, task.train(1).batch(np.arange(2)))
    assert loss.dtype == torch.float32
