# %% [markdown]
# # A real digit turned into another
#
# Noise maps (Huberman-Spiegelglas et al. 2024) hold all that the model does not say of a picture: its stroke, its
# slant. Sampled with the class that it has, they give the picture back; with another class they give that digit, in
# the same hand.

# %%
import matplotlib.pyplot as plt
import torch

from diffusion import Guided, invert, load_checkpoint, sample

STEPS = 50
GUIDANCE = 3.0
FROM = 6

digits = load_checkpoint("digit-classes")  # model(x, t, label)
network = digits.model.requires_grad_(False)
guided = Guided(network, GUIDANCE, network.no_class)
chain = digits.schedule.chain(STEPS, spacing="quadratic", eta=1.0)
real = digits.images[:1].expand(10, -1, -1, -1)

maps = invert(
    guided, real, chain, method="ddpm", inputs=(torch.full((10,), FROM),), generator=torch.Generator().manual_seed(0)
)
print(maps)

# %% [markdown]
# Ten classes, the same noise.

# %%
edited = sample(guided, maps.x_T, chain, "sequential", inputs=(torch.arange(10),), noises=maps.noises).x_0
print(f"with its own class it comes back: {(edited[FROM] - real[0]).square().sum():.1e}")

figure, axes = plt.subplots(1, 11, figsize=(9, 1.3), layout="constrained")
for axis, image, label in zip(axes, [real[0], *edited], ["real", *range(10)], strict=True):
    axis.imshow(image[0].clamp(-1, 1).numpy(), cmap="gray_r")
    axis.set(title=label, xticks=[], yticks=[])
    for edge in axis.spines.values():
        edge.set_visible(label == "real")
plt.savefig("edited-digit.png")
