"""Noise schedules: how much of the image is left at each time step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .chain import Chain, one_line
from .checks import PREDICTIONS, RULES, SPACINGS, VARIANCES, count, flag, one_of, real
from .models.clip import Clip
from .models.continuous import ContinuousSchedule
from .models.grids import SchedulerGrid
from .models.levels import EDM, GRIDS, Flow, Given, steps_of, time_steps_given, time_steps_of
from .models.schedulers import read_scheduler

# What `to_config` records where it is not the usual.
EXTRAS: dict[str, Any] = {
    "diffusers_steps": False, "spacing": "linspace", "ancestral": False, "variance": "small", "prediction": None,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Schedule:
    """ᾱ_t, t = 0 … N−1: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε with ε standard normal.

    Attributes:
        alphas_cumprod: (N,) float64, non-increasing, in (0, 1]; the last may be 0: pure noise, no signal.
        final_alpha_cumprod: ᾱ of the end of the chain, after its last step; 1 means a clean image.
        steps_offset: added to every time step of a "leading" spacing.
        origin: constructor and arguments, for `to_config`; None when the values were given one by one.
        diffusers_steps: a chain's step from t ends ⌊N/T⌋ below t, as diffusers' DDIMScheduler has it, even where the
            next step starts elsewhere (its "linspace" spacing); otherwise it ends where the next one starts.
        clip: keeps the image that each step predicts in range; None leaves it as the model says.
        spacing: of the chains' time steps, where none is asked for.
        ancestral: chains have fresh noise, eta = 1, where none is asked for, as diffusers' DDPMScheduler has it.
        variance: of that noise, "small" or "large" (`Chain.sigma`).
        prediction: what the scheduler says that its network returns; None, not known.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, by name.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float = 1.0
    steps_offset: int = 0
    origin: dict[str, Any] | None = field(default=None, repr=False)
    diffusers_steps: bool = False
    clip: Clip | None = None
    spacing: str = "linspace"
    ancestral: bool = False
    variance: str = "small"
    prediction: str | None = None
    __repr__ = one_line

    def __post_init__(self) -> None:
        alphas = self.alphas_cumprod
        if not isinstance(alphas, Tensor):
            raise TypeError(f"alphas_cumprod: a tensor is required, got {type(alphas).__name__}")
        if alphas.ndim != 1 or len(alphas) == 0 or not alphas.is_floating_point():
            raise ValueError(
                f"alphas_cumprod: a floating-point tensor (N,) is required, got {tuple(alphas.shape)}, {alphas.dtype}"
            )
        alphas = alphas.detach().to("cpu", torch.float64, copy=True)
        if not bool((alphas[:-1] > 0).all() and ((alphas >= 0) & (alphas <= 1)).all() and alphas[0] > 0):
            raise ValueError(
                "alphas_cumprod: values in (0, 1], or 0 at the last, are required, got "
                f"{alphas.min().item():g} … {alphas.max().item():g}"
            )
        if bool((alphas.diff() > 0).any()):
            rise = int((alphas.diff() > 0).nonzero()[0]) + 1
            raise ValueError(f"alphas_cumprod: must decrease, but rises at t={rise}")
        final = real("final_alpha_cumprod", self.final_alpha_cumprod)
        if not alphas[0].item() <= final <= 1:
            raise ValueError(
                f"final_alpha_cumprod: from alphas_cumprod[0] = {alphas[0].item():g} to 1 is required, got {final:g}"
            )
        object.__setattr__(self, "steps_offset", count("steps_offset", self.steps_offset, least=0))
        one_of("spacing", self.spacing, SPACINGS)
        one_of("variance", self.variance, VARIANCES)
        flag("diffusers_steps", self.diffusers_steps)
        flag("ancestral", self.ancestral)
        if self.prediction is not None:
            one_of("prediction", self.prediction, PREDICTIONS)
        if self.clip is not None and not isinstance(self.clip, Clip):
            raise TypeError(f"clip: a Clip or None is required, got {type(self.clip).__name__}")
        object.__setattr__(self, "alphas_cumprod", alphas)
        object.__setattr__(self, "final_alpha_cumprod", final)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        plain = [f.name for f in fields(self) if f.name not in ("alphas_cumprod", "origin")]
        return torch.equal(self.alphas_cumprod, other.alphas_cumprod) and all(
            getattr(self, name) == getattr(other, name) for name in plain
        )

    def __hash__(self) -> int:
        return hash((len(self), self.alphas_cumprod[-1].item(), self.final_alpha_cumprod, self.steps_offset))

    @classmethod
    def linear(cls, n: int = 1000, start: float = 1e-4, end: float = 0.02) -> Schedule:
        """Return ᾱ_t = Π_{u≤t} (1 − β_u), β evenly spaced from `start` to `end` (Ho et al. 2020)."""
        n, start, end = _betas(n, start, end)
        return cls._of_betas(torch.linspace(start, end, n, dtype=torch.float64), "linear", n=n, start=start, end=end)

    @classmethod
    def scaled_linear(cls, n: int = 1000, start: float = 0.00085, end: float = 0.012) -> Schedule:
        """Return the schedule whose √β is evenly spaced from √`start` to √`end` (Stable Diffusion)."""
        n, start, end = _betas(n, start, end)
        roots = torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64)
        return cls._of_betas(roots.square(), "scaled_linear", n=n, start=start, end=end)

    @classmethod
    def cosine(cls, n: int = 1000) -> Schedule:
        """Return β_t = min(1 − g(t+1)/g(t), 0.999), g(t) = cos²(π/2 · (t/n + s)/(1 + s)), s = 0.008.

        Nichol and Dhariwal 2021, Eq. 17; the clip keeps the last ᾱ from being 0.
        """
        n = count("n", n, least=1)
        s = 0.008
        t = torch.arange(n + 1, dtype=torch.float64)
        g = torch.cos(math.pi / 2 * (t / n + s) / (1 + s)).square()
        return cls._of_betas((1 - g[1:] / g[:-1]).clamp(max=0.999), "cosine", n=n)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Tensor, final_alpha_cumprod: float = 1.0, steps_offset: int = 0
    ) -> Schedule:
        """Return the schedule with these ᾱ (N,), kept in float64."""
        return cls(alphas_cumprod, final_alpha_cumprod, steps_offset)

    @staticmethod
    def flow(shift: float = 1.0, prediction: str | None = "flow") -> ContinuousSchedule:
        """The schedule of a rectified flow, x = (1 − s) x_0 + s ε; its model has t = 1000 s as float32.

        s runs from 1 to 0 through shift·u/(1 + (shift − 1)·u), u evenly spaced (Esser et al. 2024, Eq. 23).
        """
        return ContinuousSchedule(Flow(shift, prediction))

    @staticmethod
    def edm(
        sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5,
        prediction: str = "epsilon",
    ) -> ContinuousSchedule:  # fmt: skip
        """The schedule of Karras et al. 2022, Eq. 5, x = x_0 + σ ε, with the preconditioning of their Table 1.

        prediction: "epsilon" where the image is c_skip x + c_out F, "v" where it is c_skip x − c_out F.
        """
        return ContinuousSchedule(EDM(sigma_min, sigma_max, rho, sigma_data, prediction))

    @classmethod
    def from_diffusers(cls, scheduler: Any, mu: float | None = None) -> AnySchedule:
        """Return the schedule whose chains take the steps of a diffusers scheduler, at its own time steps.

        Read are its ᾱ and the ᾱ after its last step, spacing, clipping, fresh noise, and what its network predicts; of
        Euler's, EDM's and flow schedulers what set_timesteps makes, when a chain is made.

        Args:
            mu: of a scheduler with use_dynamic_shifting, such as FLUX's.

        Raises:
            TypeError: a scheduler of a class, or an option, that is not reproduced (`diffusion.models.schedulers`).
        """
        found = read_scheduler(scheduler, mu)
        return ContinuousSchedule(found, found.rule) if isinstance(found, SchedulerGrid) else cls(**found)

    @classmethod
    def _of_betas(cls, betas: Tensor, name: str, **arguments: float) -> Schedule:
        return cls((1 - betas).cumprod(0), origin={"name": name, **arguments})

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-ready record that `from_config` turns into an equal schedule, bit for bit."""
        origin = self.origin or {"name": "alphas_cumprod", "values": self.alphas_cumprod.tolist()}
        config = {**origin, "final_alpha_cumprod": self.final_alpha_cumprod, "steps_offset": self.steps_offset}
        config |= {name: getattr(self, name) for name, usual in EXTRAS.items() if getattr(self, name) != usual}
        if self.clip is not None:
            config["clip"] = {"bound": self.clip.bound, "quantile": self.clip.quantile}
            config["clip"] |= {"consistent": True} if self.clip.consistent else {}
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AnySchedule:
        """Return the schedule recorded by `to_config`.

        Raises:
            TypeError: `config` is not a dict, or a value in it is of the wrong type.
            ValueError: an unknown name, a missing or unknown key, or a value out of range.
        """
        if not isinstance(config, dict):
            raise TypeError(f"config: a dict is required, got {type(config).__name__}")
        if config.get("name") in GRIDS:
            return ContinuousSchedule.of_config(config)
        arguments = dict(config)
        name = arguments.pop("name", None)
        final = arguments.pop("final_alpha_cumprod", 1.0)
        offset = arguments.pop("steps_offset", 0)
        extras = {name: arguments.pop(name, usual) for name, usual in EXTRAS.items()}
        extras["clip"] = Clip.recorded(arguments.pop("clip", None))
        keys = {
            "linear": {"n", "start", "end"},
            "scaled_linear": {"n", "start", "end"},
            "cosine": {"n"},
            "alphas_cumprod": {"values"},
        }
        if name not in keys:
            raise ValueError(f"config: name must be one of {', '.join(keys)}, got {name!r}")
        if set(arguments) != keys[name]:
            raise ValueError(f"config: {name} takes {sorted(keys[name])}, got {sorted(arguments)}")
        if name == "alphas_cumprod":
            values = torch.tensor(arguments["values"], dtype=torch.float64)
            return cls(values, final, offset, **extras)
        base = getattr(cls, name)(**arguments)
        return cls(base.alphas_cumprod, final, offset, base.origin, **extras)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, in the type of x_0.

        Args:
            x_0: (N, …) clean images.
            noise: (N, …) ε, of the shape of x_0.
            t: (N,) integer time steps in 0 … len(self)−1.
        """
        if noise.shape != x_0.shape:
            raise ValueError(f"noise: the shape of x_0 {tuple(x_0.shape)} is required, got {tuple(noise.shape)}")
        if t.dtype not in (torch.int64, torch.int32) or t.shape != x_0.shape[:1]:
            raise ValueError(f"t: integers ({len(x_0)},) are required, got {tuple(t.shape)}, {t.dtype}")
        t = t.cpu()
        if len(t) and not 0 <= int(t.min()) <= int(t.max()) < len(self):
            raise ValueError(f"t: 0 … {len(self) - 1} is required, got {int(t.min())} … {int(t.max())}")
        alpha = self.alphas_cumprod[t].view(-1, *[1] * (x_0.ndim - 1)).to(x_0.device)
        return alpha.sqrt().to(x_0.dtype) * x_0 + (1 - alpha).sqrt().to(x_0.dtype) * noise

    @property
    def eta(self) -> float:
        """The share of fresh noise of a chain for which none is asked."""
        return 1.0 if self.ancestral else 0.0

    def chain(
        self, steps: int | None = None, spacing: str | None = None, eta: float | None = None, rule: str | None = None,
        *, timesteps: Given = None,
    ) -> Chain:  # fmt: skip
        """Return the chain of `steps` of this schedule's N time steps, which ends at its final ᾱ.

        Args:
            steps: T, 1 to N; None is 50.
            spacing: "linspace" (evenly from 0 to N−1), "leading" (k⌊N/T⌋ + steps_offset), "trailing" (N, N − N/T, …,
                less one) or "quadratic" (denser near the image, made strictly increasing); None is the schedule's own.
            eta: the share of fresh noise; None is the schedule's own: of a scheduler what that does, else 0.
            rule: "ddim", which None is too; "dpmsolver++2m"; "belm", whose latent is a pair of states.
            timesteps: integers of N − 1 … 0 that fall, instead of `steps` and `spacing`; each step ends where the next
                starts.

        With `diffusers_steps` each step ends ⌊N/T⌋ below its own t, as diffusers' DDIMScheduler has it, but those of a
        "quadratic" spacing, which is not diffusers', where the next one starts.
        """
        N, alphas = len(self), self.alphas_cumprod
        steps = steps_of(steps, spacing, timesteps=timesteps)
        rule = rule or "ddim"
        one_of("rule", rule, RULES)
        final = alphas.new_tensor([self.final_alpha_cumprod])
        if timesteps is not None:
            t = time_steps_given(N, timesteps)
        elif steps > N:
            raise ValueError(f"steps: 1 to {N}, the schedule's length, is required, got {steps}")
        else:
            spacing = self.spacing if spacing is None else spacing
            t = time_steps_of(N, steps, spacing, self.steps_offset, self.diffusers_steps or self.ancestral)
        if self.diffusers_steps and timesteps is None and rule == "ddim" and spacing != "quadratic":
            previous = t - N // steps
            after = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
        else:
            after = torch.cat([alphas[t[1:]], final])
        return Chain.vp(
            t, alphas[t], after, eta=self.eta if eta is None else eta, clip=self.clip, variance=self.variance,
            prediction=self.prediction, rule=rule,
        )  # fmt: skip


def _betas(n: Any, start: Any, end: Any) -> tuple[int, float, float]:
    """Return n as an int, `start` and `end` as floats, checked: 0 < start ≤ end < 1."""
    n = count("n", n, least=1)
    start, end = real("start", start), real("end", end)
    if not 0 < start <= end < 1:
        raise ValueError(f"start, end: 0 < start <= end < 1 is required, got start={start:g}, end={end:g}")
    return n, start, end


AnySchedule = Schedule | ContinuousSchedule
