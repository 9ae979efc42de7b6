from __future__ import annotations

import pytest
import torch

from fedgraft.config import Config
from fedgraft.devices import (
    check_optimizer,
    free_memory,
    is_out_of_memory,
    peak_memory,
    with_smaller_batches,
)
from fedgraft.errors import ConfigError, RunError


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, out: bool) -> None:
    assert is_out_of_memory(error) is out


def test_torch_says_so_in_these_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_memory_is_counted_in_bytes() -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu) > 10**7
    assert peak_memory(cpu) > 10**8


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_optimizers_for_cuda_are_refused_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match=r"runs on CUDA only; model\.device is cpu"):
        check_optimizer(name, torch.device("cpu"))
    check_optimizer(name, torch.device("cuda"))
    check_optimizer("adamw", torch.device("cpu"))


def test_their_state_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="optimizer-state is keep"):
        Config().with_overrides({"train.optimizer": "adamw-8bit", "train.optimizer-state": "keep"})


def test_batches_are_halved_until_they_fit() -> None:
    tried: list[int] = []

    def run(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert with_smaller_batches(16, torch.device("cpu"), run) == "done"
    assert tried == [16, 8, 4, 2]


def test_one_example_that_does_not_fit_is_told() -> None:
    def run(size: int) -> None:
        raise MemoryError

    with pytest.raises(RunError, match="not enough memory on cpu to evaluate one example"):
        with_smaller_batches(2, torch.device("cpu"), run)


def test_other_errors_pass() -> None:
    def run(size: int) -> None:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        with_smaller_batches(2, torch.device("cpu"), run)
