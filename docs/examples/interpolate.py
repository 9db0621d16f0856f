# %% [markdown]
# # Between two real pictures
#
# Every picture here has a latent, the noise from which the model makes it. `invert` finds those of two real pictures;
# what the model makes on the way from one latent to the other turns one picture into the other.

# %%
import matplotlib.pyplot as plt
import torch

from diffusion import invert, load_checkpoint, sample

MODEL = "fashion"  # or "digits", or the folder of a model of yours
STEPS = 50
PICTURES = (28, 9)  # two of the 32 real ones that come with the model
COUNT = 7

shipped = load_checkpoint(MODEL)
model = shipped.model.requires_grad_(False)
chain = shipped.schedule.chain(STEPS, spacing="quadratic")  # dense next to the image: real pictures come back
real = shipped.images[list(PICTURES)]
found = invert(model, real, chain, prediction=shipped.prediction)
print(found)

# %% [markdown]
# The way is along the sphere on which latents lie (Shoemake 1985): sin((1−s) θ)/sin θ a + sin(s θ)/sin θ b, θ the
# angle between a and b. A straight line would pass through latents shorter than the model ever sees, and make bland
# pictures.

# %%
a, b = found.x_T
angle = ((a * b).sum() / (a.norm() * b.norm())).acos()
s = torch.linspace(0, 1, COUNT, dtype=a.dtype).reshape(-1, 1, 1, 1)
way = (((1 - s) * angle).sin() * a + (s * angle).sin() * b) / angle.sin()
between = sample(model, way, chain, prediction=shipped.prediction)
error = (between.x_0[[0, -1]] - real).double().square().flatten(1).sum(1).tolist()
print(f"ends of the walk against the real pictures: {error[0]:.1e}, {error[1]:.1e}")

# %% [markdown]
# Framed: the real pictures. Between them, what the model makes.

# %%
figure, axes = plt.subplots(1, COUNT + 2, figsize=(9, 1.4), layout="constrained")
labels = ["real", *(f"{100 * k // (COUNT - 1)}%" for k in range(COUNT)), "real"]
for axis, image, label in zip(axes, [real[0], *between.x_0, real[1]], labels, strict=True):
    axis.imshow(image.clamp(-1, 1).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
    axis.set(title=label, xticks=[], yticks=[])
    for edge in axis.spines.values():
        edge.set_visible(label == "real")
plt.savefig("interpolation.png")
