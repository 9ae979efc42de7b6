"""The adapter: PEFT's names, Flower's records, a stable order, and A and B told apart by name."""

from __future__ import annotations

import hashlib
import io
import struct

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedgraft.adapter import (
    Adapter,
    LoraLayer,
    Tensors,
    digest,
    factor_name,
    from_arrays,
    natural_order,
    parse_factor,
    payload_bytes,
    to_arrays,
)
from fedgraft.errors import UpdateError
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Task


def layer(*, r: int = 2, d_in: int = 3, d_out: int = 4, fill: float = 1.0) -> LoraLayer:
    return LoraLayer(torch.full((r, d_in), fill), torch.full((d_out, r), fill + 1), 2.0)


def moved(model: ResidentModel) -> Adapter:
    """An adapter in which nothing is zero."""
    tensors = model.initial_adapter(5).tensors()
    return model.initial_adapter(5).with_tensors({n: t + 0.05 for n, t in tensors.items()})


# PEFT


def test_names_are_pefts_own(model: ResidentModel):
    theirs = get_peft_model_state_dict(model.model)
    ours = model.initial_adapter(0).tensors()
    assert set(ours) == set(theirs) and len(ours) == 2 * 12 + 2
    assert {name: tuple(t.shape) for name, t in ours.items()} == {
        name: tuple(t.shape) for name, t in theirs.items()
    }


def test_peft_reads_our_adapter_and_we_read_pefts(model: ResidentModel, digits: Task):
    adapter = moved(model)
    batch = digits.test().batch(np.arange(16))
    model.load(adapter.tensors())
    model.model.eval()
    with torch.no_grad():
        ours = model.model(pixel_values=batch["pixel_values"]).logits
        model.load(model.initial_adapter(1).tensors())  # something else in between
        other = model.model(pixel_values=batch["pixel_values"]).logits
        set_peft_model_state_dict(model.model, adapter.tensors())
        theirs = model.model(pixel_values=batch["pixel_values"]).logits
    assert torch.equal(ours, theirs) and not torch.equal(ours, other)
    back = Adapter.from_tensors(get_peft_model_state_dict(model.model), model.scaling)
    assert back.digest() == adapter.digest()


def test_an_adapter_computes_what_its_products_say(model: ResidentModel, digits: Task):
    # W0 + scaling * B A, put into the base by hand, gives the logits that PEFT gives.
    adapter = moved(model)
    base = digits.load_base()
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, one in adapter.layers.items():
            weights[f"{name.removeprefix('base_model.model.')}.weight"].add_(one.product())
        for name, extra in adapter.extras.items():
            weights[name.removeprefix("base_model.model.")].copy_(extra)
        pixels = digits.test().batch(np.arange(16))["pixel_values"]
        model.load(adapter.tensors())
        model.model.eval()
        by_peft = model.model(pixel_values=pixels).logits
        by_hand = base(pixel_values=pixels).logits
    # float32 logits of size 10; W0 x + s B (A x) is rounded at other places than (W0 + s B A) x
    torch.testing.assert_close(by_hand, by_peft, rtol=0, atol=1e-4)


# Order and names


def test_layer_2_comes_before_layer_10():
    names = ["layer.10.q", "layer.2.q", "layer.2.k", "layer", "head.bias", "layer.2"]
    wanted = ["head.bias", "layer", "layer.2", "layer.2.k", "layer.2.q", "layer.10.q"]
    assert sorted(names, key=natural_order) == wanted


def test_different_names_never_tie():
    names = ["1", "01", "001", "a1", "a01", "a", "10", "9", ""]
    assert len({natural_order(name) for name in names}) == len(names)
    once = sorted(names, key=natural_order)
    assert once == ["", "001", "01", "1", "9", "10", "a", "a01", "a1"]


def test_order_does_not_depend_on_how_an_adapter_is_built():
    names = [f"model.layers.{k}.q_proj" for k in (10, 2, 1, 0)]
    one = Adapter({n: layer() for n in names}, {"z": torch.ones(1), "h.9": torch.ones(1)})
    two = Adapter({n: layer() for n in sorted(names)}, {"h.9": torch.ones(1), "z": torch.ones(1)})
    assert list(one.tensors()) == list(two.tensors())
    assert list(one.layers) == [f"model.layers.{k}.q_proj" for k in (0, 1, 2, 10)]
    assert list(one.extras) == ["h.9", "z"]
    assert one.digest() == two.digest()


def test_a_and_b_are_told_apart_by_name_where_d_equals_r():
    A, B = torch.full((3, 3), 1.0), torch.full((3, 3), 2.0)
    tensors = {factor_name("q", "B"): B, factor_name("q", "A"): A}
    adapter = Adapter.from_tensors(tensors, 0.5)
    assert torch.equal(adapter.layers["q"].A, A) and torch.equal(adapter.layers["q"].B, B)
    assert adapter.layers["q"].rank == 3


def test_a_name_that_only_looks_like_a_factor_is_an_extra():
    assert parse_factor("m.q.lora_A.weight") == ("m.q", "A")
    assert parse_factor("m.q.lora_B.weight") == ("m.q", "B")
    for name in ("m.q.lora_A.bias", "m.lora_C.weight", "lora_A.weight", "m.lora_A.weight.x"):
        assert parse_factor(name) is None


def test_tensors_picks_factors_and_extras():
    adapter = Adapter({"q": layer()}, {"head": torch.ones(2)})
    assert list(adapter.tensors("B", extras=False)) == ["q.lora_B.weight"]
    assert list(adapter.tensors({"A"})) == ["q.lora_A.weight", "head"]
    assert list(adapter.tensors(())) == ["head"]


def test_product_is_scaling_times_b_times_a():
    # B A has entries 1 * 2 * r = 4, scaling 2.
    assert torch.equal(layer().product(), torch.full((4, 3), 8.0))
    halves = LoraLayer(torch.ones(2, 3).half(), torch.full((4, 2), 2.0).half(), 2.0)
    assert halves.product().dtype == torch.float32 and halves.product()[0, 0] == 8.0


def test_with_tensors_replaces_only_what_it_names():
    adapter = Adapter({"q": layer(), "v": layer()}, {"head": torch.ones(2)})
    changed = adapter.with_tensors({"q.lora_B.weight": torch.zeros(4, 2)})
    assert not changed.layers["q"].B.any() and changed.scalings == {"q": 2.0, "v": 2.0}
    assert torch.equal(changed.layers["q"].A, adapter.layers["q"].A)
    assert torch.equal(changed.layers["v"].B, adapter.layers["v"].B)


def test_scalings_may_differ_by_layer():
    tensors = Adapter({"q": layer(), "v": layer()}).tensors()
    adapter = Adapter.from_tensors(tensors, {"q": 0.5, "v": 4.0})
    assert adapter.scalings == {"q": 0.5, "v": 4.0}


def test_half_a_pair_and_factors_that_do_not_multiply_are_refused():
    with pytest.raises(UpdateError, match=r"no tensor 'q\.lora_A\.weight'"):
        Adapter.from_tensors({"q.lora_B.weight": torch.ones(4, 2)})
    bad = {"q.lora_A.weight": torch.ones(3, 3), "q.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(UpdateError, match=r"'q' do not multiply.*\(4, 2\).*\(3, 3\)"):
        Adapter.from_tensors(bad)


# Digests


def test_a_digest_tells_names_shapes_and_values_apart_but_not_dtypes_that_agree():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)}
    assert digest(base) == digest(dict(reversed(base.items())))
    assert digest(base) == digest({"a": base["a"].bfloat16(), "b": base["b"].half()})
    assert digest(base) != digest({"a": base["b"], "b": base["a"]})
    assert digest(base) != digest({"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(2)})
    assert digest(base) != digest(base | {"a": torch.tensor([1.0, 2.0000002])})  # one bit
    assert digest(base) != digest({"a": base["a"]})
    own = hashlib.sha256(b"a\x1f(2,)\x1f" + struct.pack("<2f", 1.0, 2.0)).hexdigest()
    assert digest({"a": torch.tensor([1.0, 2.0])}) == own


# Flower's records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_records_keep_every_bit_and_flower_reads_them_too(dtype: torch.dtype):
    rng = np.random.default_rng(0)
    values: Tensors = {
        "m.q.lora_A.weight": torch.from_numpy(rng.standard_normal((2, 5))).to(dtype),
        "m.q.lora_B.weight": torch.from_numpy(rng.standard_normal((4, 2))).to(dtype).T,  # strided
        "head.bias": torch.tensor([1e-3, -7.0, 0.0], dtype=dtype, requires_grad=True),
        "scale": torch.tensor(3.0, dtype=dtype),  # no dimension at all
        "empty": torch.zeros(0, 4, dtype=dtype),
    }
    arrays = to_arrays(values)
    wire = torch.float32 if dtype == torch.bfloat16 else dtype  # numpy has no bfloat16
    for read in (from_arrays(arrays), arrays.to_torch_state_dict()):
        assert list(read) == list(values)
        for name, tensor in read.items():
            assert tensor.dtype == wire and tensor.shape == values[name].shape
            assert torch.equal(tensor.to(dtype), values[name].detach())


def test_decoded_tensors_may_be_written_and_share_nothing_with_the_message():
    arrays = to_arrays({"x": torch.zeros(3)})
    from_arrays(arrays)["x"].add_(1)
    assert not from_arrays(arrays)["x"].any()


def test_numbers_of_another_byte_order_are_read():
    arrays = ArrayRecord({"x": Array(np.array([1.0, 2.5], dtype=">f4"))})
    assert from_arrays(arrays)["x"].tolist() == [1.0, 2.5]


def saved(values: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3))
    return buffer.getvalue()


GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "a pickle": saved(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "bare pickle": b"\x80\x04\x95\x00.",
    "cut short": saved(np.zeros(100, np.float32))[:-8],
    "a zip": zipped(),
    "a broken zip": b"PK\x03\x04 and no more",
    "words": saved(np.array(["a", "b"])),
    "structs": saved(np.zeros(2, dtype=[("x", "f4"), ("y", "f4")])),
    "dates": saved(np.zeros(2, dtype="datetime64[s]")),
    "spans": saved(np.zeros(2, dtype="timedelta64[s]")),
    "long doubles": saved(np.zeros(2, dtype=np.longdouble)),
    "a petabyte": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "no header": header("(" * 1000),
    "a header of code": header("__import__('os').getpid()"),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_by_name_and_raises_nothing_else(data: bytes):
    array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)
    with pytest.raises(UpdateError, match=r"tensor 'q\.lora_A\.weight' cannot be read"):
        from_arrays(ArrayRecord({"q.lora_A.weight": array}))


def test_another_serialisation_is_refused():
    array = Array(dtype="float32", shape=(2,), stype="torch.pickle", data=b"x")
    with pytest.raises(UpdateError, match=r"'x' cannot be read.*torch\.pickle"):
        from_arrays(ArrayRecord({"x": array}))


def test_payload_counts_numpys_headers():
    # numpy pads its header to 128 bytes.
    arrays = to_arrays({"a": torch.zeros(3, 5), "b": torch.zeros(2).half()})
    assert payload_bytes(arrays) == (128 + 60) + (128 + 4)
