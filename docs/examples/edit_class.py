"""Turns real pictures into pictures of another class, by every way to invert them, at several guidance scales.

    python docs/examples/edit_class.py --count 24 --steps 50 --guidance 1 3 7.5 --output edited-digits.png
    python docs/examples/edit_class.py --model fashion-classes --count 30 --output edited-clothes.png

Each test picture is inverted with its own class and sampled with another: digit d with d + 3, a sneaker with boot.
Printed, one line for each way and guidance scale w: the loss with its own class kept, ‖x̂_0 − x_0‖²; the share of edits
in which a support vector machine sees the new class; the squared distance from edit to source; the evaluations of the
inversion, the sampling that measures its loss included, a guided pair counted once. The picture: the sources and their
edits at the last w, of the first way at every w.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor

from diffusion import Checkpoint, Guided, invert, load_checkpoint, sample
from diffusion.program.pictures import draw_rows
from diffusion.training.data import Dataset, digits, fashion

# Way: method of `invert`, share of fresh noise, and the guidance scale while inverting; None is that of the edit.
WAYS: dict[str, tuple[str, float, float | None]] = {
    "noise maps": ("ddpm", 1.0, None),
    "exact": ("exact", 0.0, None),
    "exact at 1, then w": ("exact", 0.0, 1.0),
    "plain DDIM": ("ddim", 0.0, None),
}


CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
# Into which class those of each class are edited.
TARGETS = {"digit-classes": [(d + 3) % 10 for d in range(10)], "fashion-classes": [2, 3, 0, 4, 3, 7, 3, 9, 2, 7]}
SEEN = 6000  # training pictures that the judge learns from, at most


def data_of(model: str, folder: Path | None) -> tuple[Dataset, list[str]]:
    """The pictures that a model was trained on, and the names of their classes.

    Test pictures of clothes come class after class, so that the first ten show all of them.
    """
    if model == "digit-classes":
        return digits(), [str(d) for d in range(10)]
    data = fashion(folder)
    turn = torch.stack([(data.test_labels == y).cumsum(0) for y in range(10)])  # (10, n)
    order = (turn.gather(0, data.test_labels[None])[0] * 10 + data.test_labels).argsort()
    return replace(data, test=data.test[order], test_labels=data.test_labels[order]), list(CLOTHES)


def judge_of(data: Dataset, model: str) -> Callable[[Tensor], Tensor]:
    """A classifier of pictures (n, 1, H, W) that has nothing to do with the network."""
    options = {"gamma": 0.02, "C": 5} if model == "digit-classes" else {"gamma": "scale", "C": 10}
    machine = SVC(**options).fit(data.train[:SEEN].flatten(1).numpy(), data.train_labels[:SEEN].numpy())
    right = machine.score(data.test[:1000].flatten(1).numpy(), data.test_labels[:1000].numpy())
    print(f"the judge is right on {100 * right:.0f} % of real test pictures")
    return lambda x: torch.from_numpy(machine.predict(x.clamp(-1, 1).double().flatten(1).numpy()))


def edited(
    checkpoint: Checkpoint, x_0: Tensor, label: Tensor, other: Tensor, way: str, scale: float, args: argparse.Namespace
) -> tuple[Tensor, Tensor, float]:
    """Edits (n, …), the losses (n,) with the class kept, and the evaluations of the inversion."""
    method, eta, inverting = WAYS[way]
    chain = checkpoint.schedule.chain(args.steps, "quadratic", eta=eta).partial(args.strength)
    model, null = checkpoint.model, checkpoint.model.no_class
    guided = Guided(model, scale, null)
    source = guided if inverting is None else Guided(model, inverting, null)
    found = invert(source, x_0, chain, method, inputs=(label,), generator=torch.Generator().manual_seed(args.seed))

    def sampled(classes: Tensor) -> Tensor:
        given = {"inputs": (classes,), "noises": found.noises}
        return sample(guided, found.x_T, chain, "sequential", **given).x_0

    loss = (sampled(label) - x_0).double().square().flatten(1).sum(1)
    return sampled(other), loss, found.evaluations.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(TARGETS), default="digit-classes")
    add("--folder", type=Path, help="Fashion-MNIST's four files (default: where the Debian package has them)")
    add("--count", type=int, default=24, help="test pictures")
    add("--steps", type=int, default=50, help="T, spacing quadratic")
    add("--strength", type=float, default=1.0, help="share of the chain's steps that are inverted and sampled")
    add("--guidance", type=float, nargs="+", default=(1.0, 3.0, 7.5), help="guidance scales w")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add("--shown", type=int, default=10, help="columns of the picture")
    add("--seed", type=int, default=0, help="of the states of the noise maps")
    add("--output", type=Path, default=Path("edited-digits.png"))
    args = parser.parse_args()
    (data, names), checkpoint = data_of(args.model, args.folder), load_checkpoint(args.model)
    checkpoint.model.requires_grad_(False)
    x_0, label = data.test[: args.count], data.test_labels[: args.count]
    other, judge = torch.tensor(TARGETS[args.model])[label], judge_of(data, args.model)
    rows = {"real picture": x_0[: args.shown]}
    print(f"{args.count} test pictures of {args.model}, T = {args.steps}, quadratic, strength {args.strength:g}")
    pairs = zip(x_0, other, strict=True)
    apart = [(data.train[data.train_labels == y] - x).square().flatten(1).sum(1) for x, y in pairs]
    nearest = torch.stack([distances.min() for distances in apart]).median()
    print(f"training pictures of the new class: distance {torch.cat(apart).median():.0f}, the nearest {nearest:.0f}")
    for way in args.ways:
        for scale in args.guidance:
            images, loss, evaluations = edited(checkpoint, x_0, label, other, way, scale, args)
            seen, distance = judge(images), (images - x_0).square().flatten(1).sum(1)
            print(
                f"{way}, w = {scale:g}: loss {loss.median():.1e} (most {loss.max():.1e}); new class "
                f"{(seen == other).double().mean():.2f}, old {(seen == label).double().mean():.2f}; distance "
                f"{distance.median():.0f}; {evaluations:.0f} evaluations",
                flush=True,
            )
            if way == args.ways[0] or scale == args.guidance[-1]:
                rows[f"{way}\nw = {scale:g}"] = images[: args.shown]
    above = [f"{names[a]}\nto {names[b]}" for a, b in zip(label.tolist(), other.tolist(), strict=True)][: args.shown]
    title = f"{checkpoint.name}: real pictures turned into another class"
    draw_rows(args.output, title, rows, above=above, framed=True)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
