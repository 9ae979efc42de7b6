"""Training behind a fixed basis, against autograd through the product itself."""

from __future__ import annotations

import torch
from torch import nn

from client.latent import Latent


def test_steps_equal_those_of_autograd_through_u_c() -> None:
    torch.manual_seed(0)
    U, wanted = torch.randn(6, 3), torch.randn(6, 2)
    parameter = nn.Parameter(U @ torch.randn(3, 2))
    latent = Latent({"B": parameter}, {"B": U})
    core = latent.leaves["B"].detach().clone().requires_grad_()
    torch.testing.assert_close(U @ core, parameter)
    ours = torch.optim.SGD([latent.leaves["B"]], lr=0.05)
    theirs = torch.optim.SGD([core], lr=0.05)
    for _ in range(5):
        parameter.grad = None
        (parameter - wanted).square().sum().backward()
        latent.pull_back()
        ours.step()
        latent.push_forward()
        theirs.zero_grad()
        (U @ core - wanted).square().sum().backward()
        theirs.step()
    torch.testing.assert_close(latent.cores()["B"], core.detach())
    torch.testing.assert_close(parameter, U @ core)


def test_parameters_without_a_basis_are_their_own_leaves() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    latent = Latent({"A": parameter}, {})
    assert latent.leaves["A"] is parameter and latent.cores() == {}
