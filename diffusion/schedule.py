"""Noise schedules: how much of the image is left at each time step."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edit import Clip

if TYPE_CHECKING:
    from .chain import Chain


@dataclass(frozen=True, eq=False)
class Schedule:
    """ᾱ_t, t = 0 … N−1: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε with ε standard normal.

    Attributes:
        alphas_cumprod: (N,) float64, strictly between 0 and 1 (1 allowed at t=0), non-increasing.
        final_alpha_cumprod: ᾱ of the end of the chain, after its last step; 1 means a clean image.
        steps_offset: added to every time step of a "leading" spacing.
        origin: constructor and arguments, for `to_config`; None when the values were given one by one.
        diffusers_steps: a chain's step from t ends ⌊N/T⌋ below t, as diffusers' DDIMScheduler has it, even where the
            next step starts elsewhere (its "linspace" spacing); otherwise it ends where the next one starts.
        clip: keeps the image that each step predicts in range; None leaves it as the model says.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, by name.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float = 1.0
    steps_offset: int = 0
    origin: dict[str, Any] | None = field(default=None, repr=False)
    diffusers_steps: bool = False
    clip: Clip | None = None

    def __post_init__(self) -> None:
        alphas = self.alphas_cumprod
        if not isinstance(alphas, Tensor):
            raise TypeError(f"alphas_cumprod: a tensor is required, got {type(alphas).__name__}")
        if alphas.ndim != 1 or len(alphas) == 0 or not alphas.is_floating_point():
            raise ValueError(
                f"alphas_cumprod: a floating-point tensor (N,) is required, got {tuple(alphas.shape)}, {alphas.dtype}"
            )
        alphas = alphas.detach().to("cpu", torch.float64, copy=True)
        if not bool(((alphas > 0) & (alphas <= 1)).all()):
            raise ValueError(
                f"alphas_cumprod: values in (0, 1] are required, got {alphas.min().item():g} … {alphas.max().item():g}"
            )
        if bool((alphas.diff() > 0).any()):
            rise = int((alphas.diff() > 0).nonzero()[0]) + 1
            raise ValueError(f"alphas_cumprod: must decrease, but rises at t={rise}")
        final = _real("final_alpha_cumprod", self.final_alpha_cumprod)
        if not alphas[0].item() <= final <= 1:
            raise ValueError(
                f"final_alpha_cumprod: from alphas_cumprod[0] = {alphas[0].item():g} to 1 is required, got {final:g}"
            )
        _count("steps_offset", self.steps_offset, least=0)
        object.__setattr__(self, "alphas_cumprod", alphas)
        object.__setattr__(self, "final_alpha_cumprod", final)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return (
            torch.equal(self.alphas_cumprod, other.alphas_cumprod)
            and self.final_alpha_cumprod == other.final_alpha_cumprod
            and self.steps_offset == other.steps_offset
            and self.diffusers_steps == other.diffusers_steps
            and self.clip == other.clip
        )

    def __hash__(self) -> int:
        return hash((len(self), self.alphas_cumprod[-1].item(), self.final_alpha_cumprod, self.steps_offset))

    @classmethod
    def linear(cls, n: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Schedule":
        """Return ᾱ_t = Π_{u≤t} (1 − β_u), β evenly spaced from `start` to `end` (Ho et al. 2020)."""
        start, end = _betas(n, start, end)
        return cls._of_betas(torch.linspace(start, end, n, dtype=torch.float64), "linear", n=n, start=start, end=end)

    @classmethod
    def scaled_linear(cls, n: int = 1000, start: float = 0.00085, end: float = 0.012) -> "Schedule":
        """Return the schedule whose √β is evenly spaced from √`start` to √`end` (Stable Diffusion)."""
        start, end = _betas(n, start, end)
        roots = torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64)
        return cls._of_betas(roots.square(), "scaled_linear", n=n, start=start, end=end)

    @classmethod
    def cosine(cls, n: int = 1000) -> "Schedule":
        """Return β_t = min(1 − g(t+1)/g(t), 0.999), g(t) = cos²(π/2 · (t/n + s)/(1 + s)), s = 0.008.

        Nichol and Dhariwal 2021, Eq. 17; the clip keeps the last ᾱ from being 0.
        """
        _count("n", n, least=1)
        s = 0.008
        t = torch.arange(n + 1, dtype=torch.float64)
        g = torch.cos(math.pi / 2 * (t / n + s) / (1 + s)).square()
        return cls._of_betas((1 - g[1:] / g[:-1]).clamp(max=0.999), "cosine", n=n)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Tensor, final_alpha_cumprod: float = 1.0, steps_offset: int = 0
    ) -> "Schedule":
        """Return the schedule with these ᾱ (N,), kept in float64."""
        return cls(alphas_cumprod, final_alpha_cumprod, steps_offset)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "Schedule":
        """Return the schedule of a diffusers scheduler: its ᾱ, the ᾱ after its last step, steps_offset and clipping.

        The final ᾱ is `scheduler.final_alpha_cumprod` where there is one, else ᾱ_0 or 1 by its `set_alpha_to_one`.

        Raises:
            TypeError: `scheduler` has no tensor `alphas_cumprod`.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor):
            raise TypeError(
                f"scheduler: an object with a tensor alphas_cumprod is required, got {type(scheduler).__name__}"
            )
        config = getattr(scheduler, "config", {})
        options = config if isinstance(config, dict) else vars(config)
        final = getattr(scheduler, "final_alpha_cumprod", None)
        if final is None:
            final = 1.0 if options.get("set_alpha_to_one", True) else alphas[0].item()
        if not bool(alphas[-1] > 0):
            raise ValueError(
                "scheduler: ᾱ of its last time step is 0 (rescale_betas_zero_snr), where ε says nothing of x_0"
            )
        clip = None
        if options.get("thresholding", False):
            clip = Clip(float(options["sample_max_value"]), float(options["dynamic_thresholding_ratio"]))
        elif options.get("clip_sample", False):
            clip = Clip(float(options.get("clip_sample_range", 1.0)))
        offset = int(options.get("steps_offset", 0))
        return cls(alphas, float(final), offset, diffusers_steps=True, clip=clip)

    @classmethod
    def _of_betas(cls, betas: Tensor, name: str, **arguments: float) -> "Schedule":
        return cls((1 - betas).cumprod(0), origin={"name": name, **arguments})

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-ready record that `from_config` turns into an equal schedule, bit for bit."""
        origin = self.origin or {"name": "alphas_cumprod", "values": self.alphas_cumprod.tolist()}
        ends = {"final_alpha_cumprod": self.final_alpha_cumprod, "steps_offset": self.steps_offset}
        extras: dict[str, Any] = {"diffusers_steps": True} if self.diffusers_steps else {}
        if self.clip is not None:
            extras["clip"] = {"bound": self.clip.bound, "quantile": self.clip.quantile}
        return {**origin, **ends, **extras}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        """Return the schedule recorded by `to_config`.

        Raises:
            TypeError: `config` is not a dict, or a value in it is of the wrong type.
            ValueError: an unknown name, a missing or unknown key, or a value out of range.
        """
        if not isinstance(config, dict):
            raise TypeError(f"config: a dict is required, got {type(config).__name__}")
        arguments = dict(config)
        name = arguments.pop("name", None)
        final = arguments.pop("final_alpha_cumprod", 1.0)
        offset = arguments.pop("steps_offset", 0)
        like_diffusers = arguments.pop("diffusers_steps", False)
        if not isinstance(like_diffusers, bool):
            raise TypeError(f"diffusers_steps: true or false is required, got {like_diffusers!r}")
        clip = arguments.pop("clip", None)
        if clip is not None and (not isinstance(clip, dict) or set(clip) != {"bound", "quantile"}):
            raise ValueError(f"clip: bound and quantile are required, got {clip!r}")
        clip = None if clip is None else Clip(**clip)
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
            return cls(values, final, offset, diffusers_steps=like_diffusers, clip=clip)
        base = getattr(cls, name)(**arguments)
        return cls(base.alphas_cumprod, final, offset, base.origin, like_diffusers, clip)

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

    def chain(self, steps: int, spacing: str = "linspace", eta: float = 0.0) -> "Chain":
        """Return the DDIM chain of that many steps through this schedule; see `Chain.from_schedule`."""
        from .chain import Chain  # chain.py imports this module

        return Chain.from_schedule(self, steps, spacing, eta)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a number is required, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: a finite number is required, got {value!r}")
    return float(value)


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: an integer is required, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: at least {least} is required, got {value}")


def _betas(n: Any, start: Any, end: Any) -> tuple[float, float]:
    """Return `start` and `end` as floats, checked: 0 < start ≤ end < 1."""
    _count("n", n, least=1)
    start, end = _real("start", start), _real("end", end)
    if not 0 < start <= end < 1:
        raise ValueError(f"start, end: 0 < start <= end < 1 is required, got start={start:g}, end={end:g}")
    return start, end
