# %% [markdown]
# # A layer of infinite depth
#
# A deep equilibrium model returns the fixed point z = f(z, x) of a cell as the output of a layer. Here one reads
# handwritten digits, 8×8 pixels of scikit-learn.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from pydeqsolve import DEQ, Anderson, Stop

EPOCHS = 8
WIDTH = 64

torch.manual_seed(0)
images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(load_digits().target)
order = torch.randperm(len(images))
train, test = order[360:], order[:360]

# %% [markdown]
# The cell is one layer of an ordinary network. Its weight has spectral norm at most one, so that there is one fixed
# point.


# %%
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, z, x):
        return torch.tanh(self.state(z) + x)


layer = DEQ(Cell(), solver=Anderson(memory=5), stop=Stop(rtol=1e-3))
model = nn.Sequential(nn.Linear(64, WIDTH), layer, nn.Linear(WIDTH, 10))
print(layer)

# %% [markdown]
# Training is that of any network. What a step costs is read from `layer.solution`: evaluations of the cell forward,
# and vector-Jacobian products backward.

# %%
adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
accuracy, forward, backward = [], [], []
for _ in range(EPOCHS):
    for rows in train[torch.randperm(len(train))].split(64):
        adam.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        adam.step()
    forward.append(layer.solution.evaluations.double().mean().item())
    backward.append(layer.solution.adjoint.evaluations.double().mean().item())
    with torch.no_grad():
        accuracy.append((model(images[test]).argmax(1) == labels[test]).double().mean().item())
print(f"test accuracy {accuracy[-1]:.1%}, {forward[-1]:.1f} evaluations and {backward[-1]:.1f} products per image")

# %% [markdown]
# Left: test accuracy. Right: the cost of the layer, which is what its depth would be.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
left.plot(range(1, EPOCHS + 1), accuracy, "o-")
left.set(xlabel="epoch", ylabel="test accuracy", ylim=(0.5, 1))
right.plot(range(1, EPOCHS + 1), forward, "o-", label="evaluations, forward")
right.plot(range(1, EPOCHS + 1), backward, "s-", label="products, backward")
right.set(xlabel="epoch", ylabel="per image", ylim=(0, None))
right.legend()
plt.savefig("deq-layer.png")
