"""The autoencoder of a latent pipeline of diffusers: images to latents and back, in the network's units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor


class Autoencoder:
    """latents = (z − shift)·scale, z what the autoencoder itself makes of images in [−1, 1].

    scale is its scaling_factor, shift its shift_factor; with latents_mean and latents_std, per channel, it is
    (z − mean)·scaling_factor/std. One in float16 whose configuration says force_upcast works in float32 and is float16
    again afterwards.

    Args:
        vae: AutoencoderKL, whose mean is taken, or VQModel, whose decoder quantises.
        channels: of the latents that the network takes.

    Raises:
        TypeError: another class.
        ValueError: latents of another number of channels, or both kinds of shift.
    """

    def __init__(self, vae: Any, channels: int) -> None:
        if not isinstance(vae, (AutoencoderKL, VQModel)):
            raise TypeError(f"vae: AutoencoderKL or VQModel of diffusers is required, got {type(vae).__name__}")
        if vae.config.latent_channels != channels:
            raise ValueError(f"vae: latents of {channels} channels, the network's, are required, got those of "
                             f"{vae.config.latent_channels}")  # fmt: skip
        config = {name: vae.config.get(name) for name in ("shift_factor", "latents_mean", "latents_std")}
        if config["shift_factor"] is not None and (config["latents_mean"] or config["latents_std"]):
            raise ValueError("vae: shift_factor and latents_mean, latents_std do not go together")
        self.vae = vae
        self.scale = vae.config.scaling_factor / self._per_channel(config["latents_std"], 1.0)
        self.shift = self._per_channel(config["latents_mean"], config["shift_factor"] or 0.0)

    @staticmethod
    def _per_channel(values: Any, otherwise: float) -> Tensor:
        return torch.tensor([otherwise]) if values is None else torch.tensor(values).view(1, -1, 1, 1)

    def encode(self, images: Tensor, generator: Any = None, drawn: bool = False) -> Tensor:
        """(B, C, H, W) in [−1, 1] → latents (B, c, h, w).

        drawn: from the distribution that an AutoencoderKL says, as diffusers' img2img has it, by one generator, or a
        list of them, the first for the first image; else its mean.
        """
        with self._upcast():
            z = self._encoded(images.to(self.vae.dtype), generator, drawn)
        return (z - self.shift.to(z)) * self.scale.to(z)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) → (B, C, H, W), about [−1, 1]."""
        z = latents / self.scale.to(latents) + self.shift.to(latents)
        with self._upcast():
            image: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return image

    def _encoded(self, images: Tensor, generator: Any, drawn: bool) -> Tensor:
        encoded = self.vae.encode(images)
        z: Tensor
        if isinstance(self.vae, VQModel):
            z = encoded.latents
        elif not drawn:
            z = encoded.latent_dist.mean
        elif isinstance(generator, list):
            each = [self.vae.encode(image[None]).latent_dist for image in images]
            z = torch.cat([one.sample(g) for one, g in zip(each, generator, strict=False)])
        else:
            z = encoded.latent_dist.sample(generator)
        return z

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        needed = self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast"))
        if needed:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if needed:
                self.vae.to(torch.float16)
