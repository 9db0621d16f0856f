# %% [markdown]
# # An image from noise, all steps at once
#
# A diffusion model makes an image in hundreds of steps, one after the other. Here all steps are unknowns of one fixed
# point and are worked on together: a round evaluates the network on many time steps in one batch.

# %%
import matplotlib.pyplot as plt
import torch

from diffusion import load_checkpoint, sample

MODEL = "fashion"  # "digits" is quicker
STEPS = 250
IMAGES = 6

shipped = load_checkpoint(MODEL)
model = shipped.model.requires_grad_(False)
chain = shipped.schedule.chain(STEPS)
splitting = shipped.splitting(chain)
x_T = torch.randn(IMAGES, *shipped.shape, generator=torch.Generator().manual_seed(4))

one_by_one = sample(model, x_T, chain, method="sequential")
at_once = sample(model, x_T, chain, splitting=splitting)
print(f"one by one: {one_by_one}")
print(f"at once:    {at_once}")

# %% [markdown]
# The first row is what the first rounds know of the images, the last is sampled step by step. They differ by less
# than one part in a thousand, which is measured on the images that are returned.


# %%
def strip(images):
    """The images side by side, to show in one picture."""
    return torch.cat(list(images.clamp(-1, 1).permute(0, 2, 3, 1)), dim=1).squeeze(-1)


rows = {}
for rounds in (3, 6, 9):
    rows[f"{rounds} rounds"] = sample(model, x_T, chain, splitting=splitting, max_rounds=rounds).x_0
rows[f"{at_once.rounds} rounds: done"] = at_once.x_0
rows[f"{one_by_one.rounds} rounds, one by one"] = one_by_one.x_0
figure, axes = plt.subplots(len(rows), figsize=(6.4, 5.4), layout="constrained")
for axis, (label, images) in zip(axes, rows.items(), strict=True):
    axis.imshow(strip(images).numpy(), cmap="gray_r")
    axis.set_title(label, loc="left", fontsize=10)
    axis.axis("off")
plt.savefig("parallel-sampling.png")
