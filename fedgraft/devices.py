"""The machine's devices: which one to use, what memory it has, and when that has run out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from fedgraft.errors import NO_MEMORY, ConfigError, ModelError, RunError

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def pick_device(name: str) -> torch.device:
    """Return the device that `model.device` names; "auto" is the best one here.

    Raises:
        ModelError: no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ModelError(
            f"model.device {name!r} cannot be used here: {why}",
            'Set model.device to "auto" or "cpu".',
        ) from error
    return device


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimizer that runs on CUDA only, elsewhere.

    Raises:
        ConfigError: bitsandbytes has no kernels for it on this device.
    """
    if name not in ("adamw", "sgd") and device.type != "cuda":
        raise ConfigError(
            f"train.optimizer is {name!r}, which runs on CUDA only; model.device is {device.type}",
            "Set train.optimizer to adamw: the state of an adapter's optimizer is small anyway.",
        )


def free_memory(device: torch.device) -> int:
    """Return how many bytes can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes of the device's memory that this process has held.

    On CUDA what torch's allocator held; elsewhere all of the process's resident memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory to give."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The allocators of CPU and MPS and CUDA's libraries raise RuntimeErrors, told by their texts.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def with_smaller_batches(size: int, device: torch.device, run: Callable[[int], _Result]) -> _Result:
    """Run something that goes through batches, with half of the size as long as memory runs out.

    Args:
        size: the size of the first try.
        device: whose memory it takes.
        run: is given the size.

    Raises:
        RunError: memory does not suffice for one example at a time.
    """
    while True:
        try:
            return run(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Here and not above, where the error still holds what had been allocated.
        release_memory(device)
        if size == 1:
            raise RunError(
                f"{NO_MEMORY} on {device} to evaluate one example",
                "Lower task.max-length, or quantise the base (model.quantization).",
            )
        size = -(-size // 2)
        log.warning("out of memory: evaluating %d at a time", size)


def release_memory(device: torch.device) -> None:
    """Give back what is cached and no longer used, after an allocation has failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
