"""Gradients through a sampled chain.

The chain's Jacobian is strictly lower triangular over time, so the implicit gradient is the exact gradient of
sequential sampling and the adjoint is solved by one sweep from the image back to the noise:
λ_k = g_k + a_k λ_{k+1} + c_k J_ε(x_k)ᵀ λ_{k+1}, T vector-Jacobian products, memory of one. (A Krylov method may make no
progress on such a matrix before its T-th step, and best-iterate guards would stop it at a wrong answer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Phantom, leaves

from .remainder import Remainders


def through_chain(chain_map: Remainders, trajectory: Tensor, x_T: Tensor, conditioning: Sequence[Tensor]) -> Tensor:
    """The trajectory (B, T+1, D) with the exact gradient to x_T, conditioning and whatever else the model reads."""
    if not torch.is_grad_enabled():
        return trajectory
    parameters = _leaves(chain_map, trajectory, conditioning)
    attached = _ChainFunction.apply(chain_map, trajectory, len(conditioning), x_T, *conditioning, *parameters)
    return attached


def _epsilon(chain_map: Remainders, x: Tensor, k: int, conditioning: Sequence[Tensor]) -> Tensor:
    chain = chain_map.chain
    t, alpha = chain.timesteps[k].expand(len(x)), chain.alphas[k].expand(len(x))
    return chain_map.network.epsilon(x, t, alpha, conditioning)


def _leaves(chain_map: Remainders, trajectory: Tensor, conditioning: Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors that require a gradient and that the model reads besides its arguments, from one evaluation."""
    if not len(trajectory):
        return []
    with torch.enable_grad():
        x = trajectory[:1, -2].detach()
        eps = _epsilon(chain_map, x, len(chain_map.chain) - 1, [c[:1].detach() for c in conditioning])
    return leaves(eps)


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain_map: Remainders, trajectory: Tensor, count: int, x_T: Tensor, *rest: Tensor) -> Tensor:
        ctx.chain_map, ctx.count, ctx.like = chain_map, count, x_T
        ctx.save_for_backward(trajectory, *rest)
        return trajectory.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("second derivatives through sample are not supported")
        trajectory, *rest = ctx.saved_tensors
        needed = [i for i, t in enumerate(rest) if ctx.needs_input_grad[4 + i]]
        sums = {i: torch.zeros_like(rest[i]) for i in needed}
        chain = ctx.chain_map.chain
        g = grads[0]
        adjoint = g[:, -1]
        for k in range(len(chain) - 1, -1, -1):
            with torch.enable_grad():
                x = trajectory[:, k].detach().requires_grad_()
                conditioning = [c.detach().requires_grad_(i in needed) for i, c in enumerate(rest[: ctx.count])]
                eps = _epsilon(ctx.chain_map, x, k, conditioning)
            wanted = [conditioning[i] if i < ctx.count else rest[i] for i in needed]
            products = torch.autograd.grad(eps, [x, *wanted], chain.c[k] * adjoint, allow_unused=True)
            for i, product in zip(needed, products[1:], strict=True):
                if product is not None:
                    sums[i] = sums[i] + product
            own = products[0] if products[0] is not None else torch.zeros_like(x)
            adjoint = g[:, k] + chain.a[k] * adjoint + own
        grad_x = adjoint.to(ctx.like.dtype).reshape(ctx.like.shape) if ctx.needs_input_grad[3] else None
        return None, None, None, grad_x, *[sums.get(i) for i in range(len(rest))]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("forward mode through sample is not supported")


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
    if phantom.steps == 1:
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
