"""Latents optimised for a differentiable target: digits sampled so that a classifier sees the number asked for.

    python docs/examples/optimise_latent.py [--target 8] [--iterations 20] [--steps 50] [--at-once]

A small classifier is trained on scikit-learn's digits, in seconds. Then the log-probability of the target is climbed
through the sampled images, back to their latents x_T: `Implicit()` is the exact gradient of the chain, whose backward
pass holds the graph of one time step. x_T stays on the sphere where normal latents lie, |x_T|² = D, so that the images
stay those that the model makes. --at-once solves the adjoint for all time steps together: far fewer calls of the
network one after the other, which pays on a GPU.
"""

import argparse

import torch
from torch import nn

from diffusion import load_checkpoint, sample
from diffusion.training.data import digits
from pydeqsolve import Anderson, Implicit


def train_classifier(epochs: int = 15) -> nn.Module:
    """A convolutional network (N, 1, 8, 8) → (N, 10) logits; prints its accuracy on images it was not trained on."""
    data = digits()
    layers = [nn.Conv2d(1, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.GELU()]
    classifier = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 10))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(data.train)).split(64):
            # Blurred by noise, so that its gradient is worth following away from clean digits.
            images = data.train[part] + 0.3 * torch.randn_like(data.train[part])
            loss = nn.functional.cross_entropy(classifier(images), data.train_labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = (classifier(data.test).argmax(1) == data.test_labels).float().mean().item()
    print(f"classifier: {accuracy:.1%} of {len(data.test)} test images right")
    return classifier.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, default=8, choices=range(10))
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--at-once", action="store_true", help="the adjoint of all time steps together")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    classifier = train_classifier()
    checkpoint = load_checkpoint("digits")
    model = checkpoint.model.requires_grad_(False)  # only x_T is optimised
    chain = checkpoint.schedule.chain(arguments.steps)
    gradient = Implicit(solver=Anderson(2, coupling="causal")) if arguments.at_once else Implicit()

    x_T = torch.randn(arguments.images, *checkpoint.shape, requires_grad=True)
    radius = x_T[0].numel() ** 0.5
    optimizer = torch.optim.Adam([x_T], lr=0.1)
    for iteration in range(arguments.iterations + 1):
        out = sample(model, x_T, chain, prediction=checkpoint.prediction, gradient=gradient)
        log_probability = classifier(out.x_0).log_softmax(1)[:, arguments.target]
        if iteration in (0, arguments.iterations):
            seen = ", ".join(f"{p:.3f}" for p in log_probability.exp().tolist())
            print(f"iteration {iteration}: probability of {arguments.target}: {seen} ({out.rounds} rounds)")
        if iteration < arguments.iterations:
            optimizer.zero_grad()
            (-log_probability.sum()).backward()
            optimizer.step()
            with torch.no_grad():
                x_T.mul_(radius / x_T.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))


if __name__ == "__main__":
    main()
