# %% [markdown]
# # A thousand orbits at once
#
# Kepler's equation says where a planet is: E = M + e sin E, with the time since perihelion as angle M, the
# eccentricity e of the orbit, and the angle E that is looked for. It is a fixed point, easy for round orbits and hard
# for long ones. All are solved in one call, and each stops by itself.

# %%
import matplotlib.pyplot as plt
import torch

from pydeqsolve import Anderson, Picard, Stop, solve

POINTS = 250  # on each of four orbits

e = torch.tensor([0.1, 0.5, 0.8, 0.95], dtype=torch.float64).repeat_interleave(POINTS)[:, None]
M = torch.linspace(0, 2 * torch.pi, POINTS, dtype=torch.float64).repeat(4)[:, None]
e.requires_grad_()


def kepler(E, M, e):
    return M + e * E.sin()


# %% [markdown]
# `Picard` is plain iteration, `Anderson` mixes the last steps. Every one of the problems has a status and a cost of
# its own.

# %%
stop = Stop(rtol=1e-10, max_steps=1000)
for solver in (Picard(), Anderson(memory=2)):
    solution = solve(kepler, M, (M, e), solver=solver, stop=stop)
    by_orbit = solution.evaluations.reshape(4, POINTS).double().mean(1).tolist()
    print(f"{type(solver).__name__}: {solution}")
    print("  evaluations per problem, by orbit:", ", ".join(f"{n:.0f}" for n in by_orbit))

# %% [markdown]
# The orbits, at equal steps of time: a planet is fast near the sun, where the dots are far apart.

# %%
E = solution.z.detach()
x = (E.cos() - e.detach()).reshape(4, POINTS)
y = ((1 - e.detach() ** 2).sqrt() * E.sin()).reshape(4, POINTS)
plt.figure(figsize=(7, 3.6))
for i, label in enumerate(("e = 0.1", "0.5", "0.8", "0.95")):
    plt.plot(x[i, :: max(1, POINTS // 50)], y[i, :: max(1, POINTS // 50)], ".", label=label)
plt.plot(0, 0, "*", color="goldenrod", markersize=14)
plt.axis("equal")
plt.legend(loc="upper left")
plt.savefig("orbits.png")

# %% [markdown]
# ## The gradient
#
# How E moves with e is known: ∂E/∂e = sin E / (1 − e cos E). `backward` gives the same, from the solution alone and
# without the steps that led to it.

# %%
solution.z.sum().backward()
known = E.sin() / (1 - e.detach() * E.cos())
print(f"largest difference from the formula: {(e.grad - known).abs().max():.1e}")
