"""Local training: a plain PyTorch loop on the resident model, from one adapter to the next.

A call loads every trainable tensor it starts from, trains, and reads the result out, so nothing
of one client is left for the next; the frozen weights are never touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from client.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from fedgraft.adapter import Tensors, parse_factor
from fedgraft.config import TrainConfig
from fedgraft.errors import RunError
from fedgraft.resident_model import ResidentModel
from fedgraft.schedule import learning_rate
from fedgraft.seeds import forked_torch, stream, torch_seed
from fedgraft.tasks.task import Batch, Examples, Task


@dataclass(frozen=True)
class Assignment:
    """One client's work in one round.

    Attributes:
        settings: steps, batch size, optimizer and schedule.
        seed: the run's seed.
        round: counted from 1.
        rounds: of the whole run; the schedule spans them all.
        client: the client's name; batches and dropout are drawn from streams of this name.
        factors: the factors that train, of "A" and "B"; extras always do.
    """

    settings: TrainConfig
    seed: int
    round: int
    rounds: int
    client: str
    factors: frozenset[str] = frozenset({"A", "B"})


@dataclass(frozen=True)
class Trained:
    """What training leaves behind.

    Attributes:
        tensors: the tensors that were trained, float32, on the CPU.
        loss: mean over the steps' batches.
        steps: optimizer steps taken.
        seconds: wall-clock time of the loop.
        optimizer: the optimizer's state, for `train.optimizer-state = "keep"`.
    """

    tensors: Tensors
    loss: float
    steps: int
    seconds: float
    optimizer: Tensors = field(default_factory=dict)


def train(
    model: ResidentModel,
    task: Task,
    examples: Examples,
    start: Tensors,
    work: Assignment,
    optimizer_state: Tensors | None = None,
) -> Trained:
    """Train an adapter on one client's examples.

    Args:
        model: the resident model.
        task: gives the loss.
        examples: the client's own.
        start: every trainable tensor by name; a missing one would leave another client's.
        work: what to do.
        optimizer_state: what an earlier round kept, or None for a fresh optimizer.

    Raises:
        RunError: tensors are missing, the loss is not finite, or the factors did not move.
        ModelError: a tensor does not fit the model.
    """
    missing = [name for name in model.parameters if name not in start]
    if missing:
        raise RunError(f"the adapter to train from lacks {', '.join(missing)}")
    if len(examples) == 0:
        raise RunError(f"client {work.client} has no training examples")
    model.use_threads()
    model.load(start)
    parameters = {
        name: parameter
        for name, parameter in model.parameters.items()
        if (factor := parse_factor(name)) is None or factor[1] in work.factors
    }
    began = time.perf_counter()
    with _only_trainable(model, parameters):
        optimizer = make_optimizer(parameters, work.settings)
        if optimizer_state is not None:
            restore_optimizer(optimizer, parameters, optimizer_state)
        dropout_seed = torch_seed(work.seed, "dropout", round=work.round, client=work.client)
        with forked_torch(dropout_seed, model.device):
            loss, steps = _loop(model, task, examples, start, work, parameters, optimizer)
    seconds = time.perf_counter() - began
    trained = model.read()
    kept = {}
    if work.settings.optimizer_state == "keep":
        kept = optimizer_tensors(optimizer, parameters)
    return Trained({name: trained[name] for name in parameters}, loss, steps, seconds, kept)


def _loop(
    model: ResidentModel,
    task: Task,
    examples: Examples,
    start: Tensors,
    work: Assignment,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[float, int]:
    settings = work.settings
    steps = settings.steps_for(len(examples))
    anchors = _anchors(start, parameters) if settings.proximal_mu else {}
    batches = batch_indices(
        len(examples),
        settings.batch_size,
        stream(work.seed, "batches", round=work.round, client=work.client),
    )
    model.train_mode()
    total = torch.zeros((), device=model.device)
    for step in range(steps):
        rate = learning_rate(settings, (work.round - 1) * steps + step, work.rounds * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total += _backward(model, task, examples, next(batches), settings.micro_batch)
        for name, anchor in anchors.items():
            _add_proximal(parameters[name], anchor, settings.proximal_mu)
        if settings.grad_clip:
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.grad_clip)
        optimizer.step()
        if step == 0:
            _assert_moved(parameters, start, work)
    loss = float(total) / steps
    if not np.isfinite(loss):
        raise RunError(
            f"training diverged in round {work.round}: the loss is {loss}",
            f"Lower train.lr (now {settings.lr}) or set train.grad-clip.",
        )
    return loss, steps


def _backward(
    model: ResidentModel, task: Task, examples: Examples, indices: np.ndarray, micro: int | None
) -> Tensor:
    """Add one batch's gradient, in micro-batches of equal weight per term; return its mean loss."""
    size = micro or len(indices)
    parts: list[Batch] = [
        model.to_device(examples.batch(indices[at : at + size]))
        for at in range(0, len(indices), size)
    ]
    count = max(1, sum(task.count(part) for part in parts))
    mean = torch.zeros((), device=model.device)
    for part in parts:
        loss = task.loss(model.model, part) / count
        loss.backward()  # type: ignore[no-untyped-call]
        mean += loss.detach()
    return mean


def batch_indices(examples: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches for ever: one permutation after the other, cut without dropping any example.

    A client with fewer examples than the batch size trains on all of them at each step.
    """
    size = min(batch_size, examples)
    pool = rng.permutation(examples)
    while True:
        if len(pool) < size:
            pool = np.concatenate([pool, rng.permutation(examples)])
        yield pool[:size]
        pool = pool[size:]


def _anchors(start: Tensors, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: start[name].to(parameter.device, parameter.dtype)
        for name, parameter in parameters.items()
    }


def _add_proximal(parameter: nn.Parameter, anchor: Tensor, mu: float) -> None:
    """Add the gradient of mu/2 ||w - w_global||^2 (Li et al. 2020, FedProx, equation 2)."""
    if parameter.grad is not None:
        parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def _assert_moved(parameters: Mapping[str, nn.Parameter], start: Tensors, work: Assignment) -> None:
    """Fail when the first step changed no factor: a model whose adapter is not connected.

    At the end of a long schedule a step may be too small for float32 to show; there it is enough
    that a gradient has come.
    """
    for name, parameter in parameters.items():
        if parse_factor(name) is None:
            continue
        if not torch.equal(parameter.detach().cpu(), start[name].to(parameter.dtype)):
            return
        if work.round > 1 and parameter.grad is not None and parameter.grad.any():
            return
    raise RunError(
        f"no LoRA factor moved after the first step of round {work.round}",
        "The adapter gets no gradient: check adapter.targets, and that the loss depends on them.",
    )


@contextmanager
def _only_trainable(model: ResidentModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give gradients to the given parameters only; afterwards all have them again."""
    try:
        for name, parameter in model.parameters.items():
            parameter.requires_grad_(name in parameters)
        yield
    finally:
        for parameter in model.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
