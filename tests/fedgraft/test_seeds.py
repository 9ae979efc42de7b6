"""Named random streams: the same numbers everywhere, and none of them from a global generator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedgraft.seeds import forked_torch, stream, torch_seed

CPU = torch.device("cpu")

# The numbers below come from this snippet, which uses nothing of FedGraft (numpy 2.4.6, torch
# 2.13, x86-64). If they change, FFA-LoRA's A, initial adapters and client samples change with them.
#
#   import hashlib, numpy as np
#   def named(seed, purpose, round, client):
#       text = "\x1f".join([str(seed), purpose, str(round), client]).encode()
#       key = hashlib.sha256(text).digest()
#       words = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")]
#       return key, np.random.Generator(np.random.Philox(key=np.array(words, dtype=np.uint64)))
#   print(named(0, "batches", 3, "1")[1].integers(0, 1000, 5).tolist())
#   print(named(7, "initial-A", 0, "q")[1].uniform(-1, 1, 3).tolist())
#   print(named(0, "sample", 1, "")[1].choice(10, 4, replace=False).tolist())
#   print(named(0, "x", 0, "")[1].permutation(8).tolist())
#   print(int.from_bytes(named(0, "dropout", 2, "5")[0][:8], "big") >> 1)

GOLDEN = {
    "integers": [438, 713, 937, 204, 13],
    "uniform": [0.2132125992695899, -0.15859905480274405, -0.6285696865781518],
    "choice": [1, 6, 4, 3],
    "permutation": [4, 3, 7, 2, 5, 0, 6, 1],
    "torch_seed": 5108771067107718778,
}


def test_streams_give_the_numbers_that_they_always_gave():
    integers = stream(0, "batches", round=3, client="1").integers(0, 1000, 5)
    assert integers.tolist() == GOLDEN["integers"]
    uniform = stream(7, "initial-A", client="q").uniform(-1, 1, 3)
    assert uniform.tolist() == GOLDEN["uniform"]
    sample = stream(0, "sample", round=1).choice(10, 4, replace=False)
    assert sample.tolist() == GOLDEN["choice"]
    assert stream(0, "x").permutation(8).tolist() == GOLDEN["permutation"]
    assert torch_seed(0, "dropout", round=2, client="5") == GOLDEN["torch_seed"]


def test_every_part_of_a_name_gives_another_stream():
    names = [
        (0, "batches", 1, "1"),
        (1, "batches", 1, "1"),
        (0, "dropout", 1, "1"),
        (0, "batches", 2, "1"),
        (0, "batches", 1, "2"),
        (0, "batches", 11, ""),
        (11, "batches", 0, ""),
        (0, "batches", 0, "11"),
    ]
    draws = [stream(s, p, round=r, client=c).integers(0, 2**63, 4) for s, p, r, c in names]
    for one, other in itertools.combinations(draws, 2):
        assert not np.intersect1d(one, other).size
    assert len({torch_seed(s, p, round=r, client=c) for s, p, r, c in names}) == len(names)


def test_a_stream_does_not_remember():
    first = stream(0, "x").random(3)
    stream(0, "y").random(100)
    assert np.array_equal(stream(0, "x").random(3), first)


def test_torch_seeds_are_what_torch_takes():
    seeds = [torch_seed(seed, "dropout", client=str(seed)) for seed in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # and use the whole width


def test_forked_torch_is_seeded_inside_and_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    wanted = torch.rand(4)
    torch.manual_seed(123)
    with forked_torch(9, CPU):
        one = torch.rand(3)
    assert torch.equal(torch.rand(4), wanted)
    with forked_torch(9, CPU):
        assert torch.equal(torch.rand(3), one)
    with forked_torch(10, CPU):
        assert not torch.equal(torch.rand(3), one)


def test_forked_torch_puts_the_state_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), forked_torch(9, CPU):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)
