"""What a valid update looks like, down to the limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedgraft.adapter import Tensors
from fedgraft.errors import UpdateError
from strategies.validation import MAX_WEIGHT, Expected, check_weight, norm

LIKE: Tensors = {"A": torch.zeros(2, 3), "B": torch.zeros(3, 2)}
EXPECTED = Expected(LIKE, max_norm=5.0)


def update(**tensors: torch.Tensor) -> Tensors:
    return {name: tensor.clone() for name, tensor in (LIKE | tensors).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtypes_of_the_wire_pass(dtype: torch.dtype):
    EXPECTED.check({name: tensor.to(dtype) for name, tensor in LIKE.items()}, 1.0)


def test_an_adapter_of_doubles_takes_doubles():
    doubles = {name: tensor.double() for name, tensor in LIKE.items()}
    Expected(doubles, 5.0).check(doubles, 1.0)
    with pytest.raises(UpdateError, match=r"tensor 'A' has dtype torch\.float64, not"):
        EXPECTED.check(doubles, 1.0)


def test_names_in_any_order_pass():
    EXPECTED.check(dict(reversed(LIKE.items())), 1.0)


def test_the_norm_is_over_all_tensors_together_and_the_limit_itself_passes():
    at = update(A=torch.tensor([[3.0, 0, 0], [0, 0, 0]]), B=torch.tensor([[4.0, 0]] + [[0, 0]] * 2))
    EXPECTED.check(at, 1.0)  # 3, 4, 5
    at["B"][2, 1] = 0.01
    with pytest.raises(UpdateError, match=r"its norm 5 is absurd; the limit is 5"):
        EXPECTED.check(at, 1.0)
    assert norm(at) == pytest.approx(math.sqrt(25.0001))


def test_the_largest_float32_is_absurd_but_not_infinite():
    big = update(A=torch.full((2, 3), 3.4e38))
    with pytest.raises(UpdateError, match=r"its norm 8\.33e\+38 is absurd"):
        EXPECTED.check(big, 1.0)


@pytest.mark.parametrize("weight", [1e-300, 0.5, 1.0, MAX_WEIGHT])
def test_weights_that_pass(weight: float):
    check_weight(weight)


@pytest.mark.parametrize("weight", [0.0, -0.0, -1e-300, -1.0, math.nan, math.inf, -math.inf, 1.1e9])
def test_weights_that_do_not(weight: float):
    with pytest.raises(UpdateError, match=r"its weight \(num-examples\) is"):
        check_weight(weight)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["A", "B", "C"]),
        st.sampled_from([(2, 3), (3, 2), (1, 3), (2,), ()]).flatmap(
            lambda shape: arrays(np.float32, shape, elements=st.floats(width=32))
        ),
    ),
    st.floats(),
)
def test_nothing_passes_that_is_not_an_adapter_and_nothing_else_is_raised(
    sent: dict[str, np.ndarray], weight: float
):
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in sent.items()}
    good = (
        {name: tuple(t.shape) for name, t in tensors.items()} == {"A": (2, 3), "B": (3, 2)}
        and all(bool(t.isfinite().all()) for t in tensors.values())
        and sum(float(t.double().square().sum()) for t in tensors.values()) <= 25.0
        and 0 < weight <= 1e9
    )
    try:
        EXPECTED.check(tensors, weight)
    except UpdateError:
        assert not good
    else:
        assert good
