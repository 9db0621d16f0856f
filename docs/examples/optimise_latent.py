# %% [markdown]
# # A latent optimised for a target
#
# A sampled image is differentiable: the gradient of what is asked of it reaches the noise that it came from. Here a
# small classifier asks for the digit 8.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from diffusion import load_checkpoint, sample
from diffusion.training.data import digits
from pydeqsolve import Implicit

TARGET = 8
ITERATIONS = 20
STEPS = 50
IMAGES = 6

torch.manual_seed(0)
data = digits()
classifier = nn.Sequential(
    nn.Conv2d(1, 24, 3, padding=1),
    nn.GELU(),
    nn.Conv2d(24, 24, 3, stride=2, padding=1),
    nn.GELU(),
    nn.Flatten(),
    nn.Linear(24 * 16, 10),
)
adam = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
for _ in range(15):
    for rows in torch.randperm(len(data.train)).split(64):
        adam.zero_grad()
        # Noise, so that its gradient is worth following away from clean digits.
        noisy = data.train[rows] + 0.3 * torch.randn_like(data.train[rows])
        nn.functional.cross_entropy(classifier(noisy), data.train_labels[rows]).backward()
        adam.step()
accuracy = (classifier(data.test).argmax(1) == data.test_labels).float().mean()
classifier.requires_grad_(False)
print(f"classifier: {accuracy:.1%} of {len(data.test)} test images right")

# %% [markdown]
# `Implicit()` is the exact gradient of the whole chain; its backward pass holds the graph of one time step.
# `Implicit(solver=Anderson(2, coupling="causal"))` solves for all time steps together, which pays on a GPU. x_T stays
# on the sphere where normal latents lie, ‖x_T‖² = D, so that the images stay those that the model makes.

# %%
shipped = load_checkpoint("digits")
model = shipped.model.requires_grad_(False)  # only x_T is optimised
chain = shipped.schedule.chain(STEPS)
x_T = torch.randn(IMAGES, *shipped.shape, requires_grad=True)
radius = x_T[0].numel() ** 0.5
adam = torch.optim.Adam([x_T], lr=0.1)
shown = []
for iteration in range(ITERATIONS + 1):
    out = sample(model, x_T, chain, prediction=shipped.prediction, gradient=Implicit())
    log_probability = classifier(out.x_0).log_softmax(1)[:, TARGET]
    if iteration in (0, ITERATIONS):
        shown.append(out.x_0.detach())
        seen = ", ".join(f"{p:.3f}" for p in log_probability.exp().tolist())
        print(f"iteration {iteration}: probability of {TARGET}: {seen}")
    if iteration < ITERATIONS:
        adam.zero_grad()
        (-log_probability.sum()).backward()
        adam.step()
        with torch.no_grad():
            x_T.mul_(radius / x_T.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))

# %% [markdown]
# Top: what the latents made at first. Bottom: the same latents, optimised.

# %%
figure, axes = plt.subplots(2, IMAGES, figsize=(1.2 * IMAGES, 2.5), layout="constrained", squeeze=False)
for row, images in zip(axes, shown, strict=True):
    for axis, image in zip(row, images, strict=True):
        axis.imshow(image[0].clamp(-1, 1).numpy(), cmap="gray_r")
        axis.axis("off")
plt.savefig("optimised.png")
