"""Phantom gradients through a sampled chain: a few applications of its map, differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydeqsolve import Phantom

from .remainder import Remainders


def through_phantom(
    chain_map: Remainders, trajectory: Tensor, x_T: Tensor, conditioning: Sequence[Tensor], drift: Tensor | None,
    phantom: Phantom,
) -> Tensor:  # fmt: skip
    """The trajectory with the phantom gradient: X ← τ h(X) + (1−τ) X, `steps` times from X*, differentiated.

    h(X)_k = P_k (x_T + Σ_{j<k} (c_j N(X_j) + …)/P_{j+1}) injects x_T in every row. With one step the network is read at
    fixed states, so the gradient of x_0 with respect to x_T is the number τ P_T times the identity: no network
    Jacobian enters and the backward pass costs nothing. With more steps it reads x_T itself at the first one; steps = T
    and τ = 1 give the exact gradient.
    """
    if not torch.is_grad_enabled():
        return trajectory
    B, T = trajectory.shape[0], len(chain_map.chain)
    attached = x_T.double().flatten(1)
    if phantom.steps == 1 or not B:
        scale = phantom.damping * chain_map.linear.P
        return trajectory.detach() + scale * (attached - attached.detach())[:, None]
    k = torch.arange(T, device=trajectory.device)
    X = trajectory[:, :T].detach()
    X = torch.cat([attached[:, None], X[:, 1:]], 1)
    tau = phantom.damping
    full = trajectory.detach()
    for _ in range(phantom.steps):
        states = X.reshape(B * T, -1)
        N = chain_map.remainder(states, k.repeat(B), [c.repeat_interleave(T, 0) for c in conditioning])
        base = chain_map.linear.base(attached, drift)
        h = chain_map.linear.trajectory(base, N.reshape(B, T, -1))
        full = tau * h + (1 - tau) * full
        X = torch.cat([attached[:, None], full[:, 1:T]], 1)
    return trajectory + (full - full.detach())
