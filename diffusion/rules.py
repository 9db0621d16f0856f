"""The rules by which a chain steps: coefficients of s_{k+1} = a s_k + c e_k + a' s_{k−1} + c' e_{k−1}, all (T,).

α, σ of the state before step k, α⁺, σ⁺ after it, α⁻, σ⁻ of the one before s_k. The first step of every rule is DDIM's.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
FEW = 15  # steps; with fewer the last is of first order


def dpmsolver(before: Pair, after: Pair, first_order: Pair, skipped: int = 0) -> Coefficients:
    """DPM-Solver++ of order 2, multistep, midpoint (Lu et al. 2022, Algorithm 2).

    s_{k+1} = (σ⁺/σ) s_k + w ((1 + q) m_k − q m_{k−1}), m = (s − σ ε)/α the image predicted, w = α⁺ − α σ⁺/σ,
    q = h/(2 h⁻), h and h⁻ the last two steps of λ = log(α/σ). The last step is of first order where it ends without
    noise, and where there are fewer than 15, with the `skipped` ones that a longer chain has before the first.
    """
    (alpha, sigma), (alpha_next, sigma_next) = before, after
    level = alpha.log() - sigma.log()
    h, h_before = alpha_next.log() - sigma_next.log() - level, level - level.roll(1)
    second = torch.ones_like(alpha, dtype=torch.bool)
    second[0] = False
    second[-1] &= len(alpha) + skipped >= FEW and bool(sigma_next[-1] > 0)
    q = torch.where(second, h / (2 * h_before), 0.0)
    w, (alpha_before, sigma_before) = alpha_next - alpha * sigma_next / sigma, (part.roll(1) for part in before)
    linear, share = sigma_next / sigma, torch.where(second, w * q / alpha_before, 0.0)
    a = torch.where(second, linear + w * (1 + q) / alpha, first_order[0])
    c = torch.where(second, -w * (1 + q) * sigma / alpha, first_order[1])
    # Without signal e is −x̂_0 instead of ε; h⁻ is infinite then and q is 0.
    share = torch.where(alpha_before > 0, share, 0.0)
    return a, c, -share, share * sigma_before


def belm(before: Pair, after: Pair, first_order: Pair, skipped: int = 0) -> Coefficients:
    """O-BELM (Wang et al. 2024): exact backwards by algebra, because ε is asked at s_k alone. With r = σ/α,

    s_{k+1} = (h²/h⁻²)(α⁺/α⁻) s_{k−1} + ((h⁻² − h²)/h⁻²)(α⁺/α) s_k − (h (h + h⁻)/h⁻) α⁺ ε_k, h = r − r⁺, h⁻ = r⁻ − r.
    """
    (alpha, sigma), (alpha_next, sigma_next) = before, after
    ratio = sigma / alpha
    h, h_before, alpha_before = ratio - sigma_next / alpha_next, ratio.roll(1) - ratio, alpha.roll(1)
    share = (h / h_before).square()
    a, c = (1 - share) * alpha_next / alpha, -h * (h + h_before) / h_before * alpha_next
    a_before = share * alpha_next / alpha_before
    a[0], c[0], a_before[0] = first_order[0][0], first_order[1][0], 0.0
    return a, c, a_before, torch.zeros_like(a)


TWO_STEP = {"dpmsolver++2m": dpmsolver, "belm": belm}
