"""The largest entries of a whole adapter."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.selection import largest


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.lists(st.integers(0, 4).map(float), min_size=1, max_size=8), min_size=1, max_size=4
    ),
    count=st.integers(-1, 33),
)
def test_exactly_so_many_and_none_left_out_is_larger(values: list[list[float]], count: int) -> None:
    """Small integers, so that most entries tie."""
    scores = {f"layer.{k}": torch.tensor(row) for k, row in enumerate(values)}
    masks = largest(scores, count)
    flat = np.concatenate([scores[name].numpy() for name in scores])
    taken = np.concatenate([masks[name].numpy() for name in scores])
    assert taken.sum() == min(max(count, 0), len(flat))
    if taken.any() and not taken.all():
        assert flat[taken].min() >= flat[~taken].max()
    # a stable sort from the largest down gives the first of equal ones
    order = np.argsort(-flat, kind="stable")[: max(count, 0)]
    assert set(np.flatnonzero(taken)) == set(order)


def test_all_tensors_compete_in_natural_order_whatever_the_dict_says() -> None:
    scores = {
        "layer.10": torch.tensor([[1.0, 5.0]]),
        "layer.2": torch.tensor([[1.0], [0.5]]),
    }
    masks = largest(scores, 2)
    assert masks["layer.10"].tolist() == [[False, True]]
    assert masks["layer.2"].tolist() == [[True], [False]]  # 2 comes before 10
