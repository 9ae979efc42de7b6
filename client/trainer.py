"""Local training: a plain PyTorch loop on the resident model, from one adapter to the next.

A call loads every trainable tensor it starts from, trains, and reads the result out, so nothing
of one client is left for the next; the frozen weights are never touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from client.batch_gradient import BatchGradient
from client.latent import Latent
from client.optimizers import make_optimizer, optimizer_tensors, rate_of, restore_optimizer
from client.private_training import PrivateGradient, Privately
from fedgraft.adapter import Adapter, Tensors, pad_rank, parse_factor
from fedgraft.config import TrainConfig
from fedgraft.errors import DIVERGED, RunError
from fedgraft.resident_model import ResidentModel
from fedgraft.schedule import learning_rate
from fedgraft.seeds import forked_torch, stream, torch_seed
from fedgraft.stopping import stop_if_asked
from fedgraft.tasks.task import Examples, Task
from strategies.local import Trained, Training
from strategies.ranks import cut_factor, ranks_of

PLAIN = Training()
"""The plain loop: both factors and all extras."""


@dataclass(frozen=True)
class Assignment:
    """One client's work in one round.

    Attributes:
        settings: steps, batch size, optimizer and schedule.
        seed: the run's seed.
        round: counted from 1.
        rounds: of the whole run; the schedule spans them all.
        client: the client's name; batches and dropout are drawn from streams of this name.
        how: which factors train, and what else the rule asks for.
        private: by which noise, where every example's part in the result is to be hidden.
    """

    settings: TrainConfig
    seed: int
    round: int
    rounds: int
    client: str
    how: Training = PLAIN
    private: Privately | None = None

    @property
    def rates(self) -> Mapping[str, float]:
        """By factor, what its learning rate is multiplied by: the rule's word, or LoRA+'s."""
        return self.how.rates or self.settings.rates

    def steps(self, examples: int) -> int:
        """Return how many optimizer steps are taken on so many examples."""
        settings = self.settings
        if self.how.epochs is not None:
            settings = settings.model_copy(update={"epochs": self.how.epochs, "steps": None})
        return settings.steps_for(examples)


@dataclass(frozen=True)
class LocalResult(Trained):
    """What training leaves behind; see also `strategies.local.Trained`.

    Attributes:
        loss: mean over the steps' batches; 0 after private training, which keeps it back.
        steps: optimizer steps taken.
        seconds: wall-clock time of the loop.
        optimizer: the optimizer's state, for `train.optimizer-state = "keep"`.
    """

    loss: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    optimizer: Tensors = field(default_factory=dict)


def train(
    model: ResidentModel,
    task: Task,
    examples: Examples,
    start: Adapter,
    work: Assignment,
    optimizer_state: Tensors | None = None,
) -> LocalResult:
    """Train an adapter on one client's examples.

    Args:
        model: the resident model.
        task: gives the loss.
        examples: the client's own.
        start: the whole adapter, of the model's rank or a smaller one; a tensor that it lacked
            would leave another client's.
        work: what to do.
        optimizer_state: what an earlier round kept, or None for a fresh optimizer.

    Raises:
        RunError: tensors are missing, the loss is not finite, or the factors did not move.
        StoppedError: somebody has asked this training to end (`fedgraft.stopping`).
        ModelError: a tensor does not fit the model.
        PrivacyError: private training is asked for, and an example's own gradient is not known.
    """
    begin = start.tensors()
    missing = [name for name in model.parameters if name not in begin]
    if missing:
        raise RunError(f"the adapter to train from lacks {', '.join(missing)}")
    if len(examples) == 0:
        raise RunError(f"client {work.client} has no training examples")
    model.use_threads()
    model.take(start)
    parameters = _trained(model, work.how, work.rates)
    began = time.perf_counter()
    with _only_trainable(model, parameters):
        loop = _Loop(model, task, examples, work, parameters, optimizer_state, ranks_of(begin))
        dropout_seed = torch_seed(work.seed, "dropout", round=work.round, client=work.client)
        with forked_torch(dropout_seed, model.device), loop.watching():
            loss = loop.run()
    seconds = time.perf_counter() - began
    after = model.read()
    return LocalResult(
        {name: cut_factor(name, after[name], loop.ranks.get(name)) for name in parameters},
        rate=loop.rate,
        cores=loop.latent.cores(),
        loss=loss,
        steps=loop.steps,
        seconds=seconds,
        optimizer=loop.kept(),
    )


def _trained(
    model: ResidentModel, how: Training, rates: Mapping[str, float]
) -> dict[str, nn.Parameter]:
    """Return the parameters that train, those of one learning rate beside each other."""
    chosen = {
        name: parameter
        for name, parameter in model.parameters.items()
        if (how.extras if (factor := parse_factor(name)) is None else factor[1] in how.factors)
    }
    if not rates:
        return chosen
    return {name: chosen[name] for name in sorted(chosen, key=lambda n: rate_of(n, rates))}


class _Loop:
    """One call's optimizer steps.

    Attributes:
        steps: how many.
        rate: the learning rates of the steps so far, added up.
        latent: what trains in place of parameters that lie behind a basis.
        ranks: the client's own rank by factor, which the model's may be padded from.
        gradient: adds the gradient of a batch.
    """

    def __init__(
        self,
        model: ResidentModel,
        task: Task,
        examples: Examples,
        work: Assignment,
        parameters: Mapping[str, nn.Parameter],
        optimizer_state: Tensors | None,
        ranks: dict[str, int],
    ) -> None:
        self.ranks = ranks
        self.model, self.task, self.examples, self.work = model, task, examples, work
        self.parameters = parameters
        self.settings = work.settings
        self.steps = work.steps(len(examples))
        self.rate = 0.0
        self.latent = Latent(parameters, work.how.bases)
        self.optimizer = make_optimizer(self.latent.leaves, self.settings, work.rates)
        if optimizer_state is not None:
            restore_optimizer(self.optimizer, self.latent.leaves, optimizer_state)
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.masks = {
            name: _as_large(mask.to(parameters[name].device, torch.bool), parameters[name])
            for name, mask in work.how.masks.items()
            if name in parameters
        }
        size = self.settings.micro_batch
        self.gradient = BatchGradient(model, task, examples, parameters.values(), size)
        self.watching: Callable[[], AbstractContextManager[None]] = nullcontext
        if work.private is not None:
            self.masks |= self._unpadded()
            self.gradient = PrivateGradient(
                model, task, examples, parameters, work.private, self.masks, size
            )
            self.watching = self.gradient.watching

    def _unpadded(self) -> Tensors:
        """Return masks of what is the client's own in padded factors: noise would fill the rest."""
        return {
            name: _as_large(torch.ones_like(cut, dtype=torch.bool), parameter)
            for name, parameter in self.parameters.items()
            if name not in self.masks
            and (cut := cut_factor(name, parameter, self.ranks.get(name))).shape != parameter.shape
        }

    def _batches(self) -> Iterator[np.ndarray]:
        work = self.work
        if work.private is not None:
            return work.private.drawn(len(self.examples))
        rng = stream(work.seed, "batches", round=work.round, client=work.client)
        return batch_indices(len(self.examples), self.settings.batch_size, rng)

    def run(self) -> float:
        """Take all steps; return the mean loss of their batches."""
        work, settings = self.work, self.settings
        batches = self._batches()
        self.model.train_mode()
        total = torch.zeros((), device=self.model.device)
        for step in range(self.steps):
            stop_if_asked()
            at = (work.round - 1) * self.steps + step
            rate = learning_rate(settings, at, work.rounds * self.steps)
            self.rate += rate
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["multiplier"]
            total += self._step(next(batches))
            if step == 0:
                _assert_moved(self.parameters, self.start, work)
        loss = float(total) / self.steps
        sound, found = np.isfinite(loss), f"the loss is {loss}"
        if work.private is not None:  # whose loss nobody may see, unlike what was trained
            sound = all(bool(p.isfinite().all()) for p in self.parameters.values())
            found = "what was trained is not finite"
        if not sound:
            raise RunError(
                f"{DIVERGED} in round {work.round}: {found}",
                f"Lower train.lr (now {settings.lr}) or set train.grad-clip.",
            )
        return loss

    def _step(self, indices: np.ndarray) -> Tensor:
        settings, how = self.settings, self.work.how
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self.gradient.add(indices)
        if settings.proximal_mu:
            for name, parameter in self.parameters.items():
                _add_proximal(parameter, self.start[name], settings.proximal_mu)
        if how.penalty is not None:
            own = {n: cut_factor(n, p, self.ranks.get(n)) for n, p in self.parameters.items()}
            how.penalty(own).backward()  # type: ignore[no-untyped-call]
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        self.latent.pull_back()
        if settings.grad_clip and self.work.private is None:  # which clips each example
            leaves = list(self.latent.leaves.values())
            torch.nn.utils.clip_grad_norm_(leaves, settings.grad_clip)
        self.optimizer.step()
        self.latent.push_forward()
        with torch.no_grad():
            for name, mask in self.masks.items():  # which weight decay does not heed
                parameter = self.parameters[name]
                parameter.copy_(torch.where(mask, parameter, self.start[name]))
        return loss

    def kept(self) -> Tensors:
        """Return the optimizer's state where the config keeps it."""
        if self.settings.optimizer_state != "keep":
            return {}
        return optimizer_tensors(self.optimizer, self.latent.leaves)


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


def _as_large(mask: Tensor, parameter: Tensor) -> Tensor:
    """Return a mask of a client's own rank in the shape of the model's padded factor."""
    for axis in range(mask.ndim):
        if mask.shape[axis] < parameter.shape[axis]:
            mask = pad_rank(mask, parameter.shape[axis], axis)
    return mask


def _add_proximal(parameter: nn.Parameter, anchor: Tensor, mu: float) -> None:
    """Add the gradient of mu/2 ||w - w_global||^2 (Li et al. 2020, FedProx, equation 2)."""
    if parameter.grad is not None:
        parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def _assert_moved(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], work: Assignment
) -> None:
    """Fail when the first step changed no factor: a model whose adapter is not connected.

    At the end of a long schedule a step may be too small for float32 to show; there it is enough
    that a gradient has come.
    """
    for name, parameter in parameters.items():
        if parse_factor(name) is None:
            continue
        if not torch.equal(parameter.detach(), start[name]):
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
