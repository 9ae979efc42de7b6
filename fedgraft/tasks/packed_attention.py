"""Scores of packed rows, each row blind to the others, in one of two ways that give the same.

- Row by row: all rows lie in one sequence without any padding; the layers that work on single
  tokens see that, and attention is computed for one row after the other. For a base whose attention
  is torch's (`sdpa`, transformers' default): no mask is made, and nothing is computed to be thrown
  away.
- Masked: where positions start anew and no attention mask is given, transformers masks what lies
  before, in each attention implementation of its own.

Which of them a base can do is asked once, by a probe on the loaded model: some architectures take
no positions, or would let rows see each other, and are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedgraft.errors import ConfigError
from fedgraft.tasks.task import Batch

Way = Literal["row by row", "masked"]
NAME = "fedgraft_rows"
"""Of our attention among transformers': for batches that are not packed it is its `sdpa`."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far apart scores may be that should be equal, relative to the largest; half types: 5%."""
_LENGTHS = "fedgraft_lengths"  # the argument by which the lengths of rows reach the attention
_ways: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()


def packed_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Score a batch that `packing.packed` made.

    Args:
        model: a causal language model.
        batch: its `attention_mask` says what is padding; only row by row it is left out.

    Returns:
        Scores (sequences, length, vocabulary) and labels (sequences, length) of the same tokens.

    Raises:
        ConfigError: the model cannot keep rows apart.
    """
    ids, positions, labels = (batch[name] for name in ("input_ids", "position_ids", "labels"))
    if way_of(model) == "masked":
        return _masked(model, ids, positions), labels
    held = batch["attention_mask"].bool()
    return _row_by_row(model, ids[held][None], positions[held][None]), labels[held][None]


def way_of(model: nn.Module) -> Way:
    """Return how packed rows are scored by this model, and prepare it on the first call.

    Raises:
        ConfigError: its forward takes no positions, or packed rows see each other.
    """
    way = _ways.get(model)
    if way is None or (way == "row by row" and _implementation(model) != NAME):
        with _at_rest(model):
            way = _ways[model] = _choose(model)
    return way


def _choose(model: nn.Module) -> Way:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    remedy = "Set train.packing to false for this base."
    peft: Any = model
    inner = peft.get_base_model() if hasattr(model, "get_base_model") else peft
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ConfigError(
            f"train.packing needs a base that takes positions, and {kind} does not", remedy
        )
    if _implementation(model) in ("sdpa", NAME):
        _register()
        inner.set_attn_implementation(NAME)
        if _apart(model, "row by row") is None:
            return "row by row"
        inner.set_attn_implementation("sdpa")
    if (change := _apart(model, "masked")) is not None:
        raise ConfigError(
            f"packed rows see each other in a base of type {kind}: their scores change by "
            f"{change:.2g}",
            remedy,
        )
    return "masked"


def _implementation(model: nn.Module) -> str | None:
    """Return which of transformers' attentions a model uses; somebody may have chosen another."""
    found: str | None = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return found


def _apart(model: nn.Module, way: Way) -> float | None:
    """Score a row alone, and behind two others; return how much its scores change, if they do."""
    device = next(model.parameters()).device
    score = _masked if way == "masked" else _row_by_row

    def scores(*rows: Sequence[int]) -> Tensor:
        ids = torch.tensor([[token for row in rows for token in row]], device=device)
        positions = [position for row in rows for position in range(len(row))]
        made = score(model, ids, torch.tensor([positions], device=device))
        return made[0, -len(rows[-1]) :].float()

    row = [1, 2, 3, 4]
    alone = scores(row)
    try:
        behind = [scores(other, row) for other in ([5, 6, 7, 8, 9], [9, 5, 8, 6, 5])]
    except (RuntimeError, TypeError, ValueError):
        if way == "masked":
            raise
        return float("inf")  # this architecture's attention is not called as others' are
    allowed = TOLERANCE.get(next(model.parameters()).dtype, 5e-2) * float(alone.abs().max())
    change = max(float((other - alone).abs().max()) for other in behind)
    return None if change <= allowed else change  # NaN is a change


def _masked(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    scores: Tensor = output.logits
    return scores


def _row_by_row(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([position_ids.shape[1]])])
    output = model(
        input_ids=input_ids,
        position_ids=position_ids,
        # One of four axes is taken for ready made, and ours is never looked at.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        use_cache=False,
        **{_LENGTHS: (ends - starts).tolist()},
    )
    scores: Tensor = output.logits
    return scores


def _register() -> None:
    """Make our attention known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' sdpa does, within each row where lengths are given.

    Args:
        module: the attention layer.
        query: (batch, heads, tokens, width); key and value may have fewer heads.
        key: as query.
        value: as query.
        attention_mask: for batches that are not packed.
        options: what the layer gives; a `sliding_window` holds within rows, too.

    Returns:
        (batch, tokens, heads, width), and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    lengths = options.pop(_LENGTHS, None)
    if lengths is None:
        attended, _ = sdpa(module, query, key, value, attention_mask, **options)
        return attended, None
    window = options.get("sliding_window")
    options["is_causal"] = True
    rows = zip(*(torch.split(whole, lengths, 2) for whole in (query, key, value)), strict=True)
    parts = [sdpa(module, q, k, v, _window_mask(q, window), **options)[0] for q, k, v in rows]
    return torch.cat(parts, dim=1), None


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return which tokens of a row longer than a sliding window see each other, else None."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=query.device)
    distance = at[:, None] - at[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for the block, and leave every module as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
