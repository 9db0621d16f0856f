"""The options of the command deq-ddim, and what they may be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .parser import Completion, Parser, Version, finite_number, label, numbers, positive, share, share_or_all, whole

RULES = ("ddim", "dpmsolver++2m", "belm")
DESCRIPTION = """\
Samples images from a diffusion model with all time steps of the DDIM chain in parallel, and finds
the latent that a real image comes from."""
EPILOG = """\
examples:
  deq-ddim demo                                    both shipped models, pictures and a table, in a few minutes
  deq-ddim sample --model digits --count 16        16 images in parallel over time, into sample-output/
  deq-ddim invert --model fashion --method exact   latents of the shipped test images, into invert-output/
  deq-ddim edit --latents invert-output --vary .2  their neighbours; then: deq-ddim sample --latents edit-output
  deq-ddim fit --data photos/ -o my-model          trains a model; then: deq-ddim sample --model my-model
  deq-ddim report                                  the paper's figures and tables, into report-output/report.html
  deq-ddim classifier --data digits                trains the classifier in whose features the report measures
  deq-ddim doctor                                  versions, native module, devices, threads, and what to change

An interrupted invert, fit or report goes on when the same command is given again.
exit codes: 0 done, 1 the work failed, 2 wrong options or input, 130 interrupted (Ctrl-C)"""


def build_parser() -> Parser:
    """Return the parser of all commands."""
    layout = argparse.RawTextHelpFormatter
    parser = Parser(prog="deq-ddim", description=DESCRIPTION, epilog=EPILOG, formatter_class=layout)
    parser.add_argument("--version", action=Version)
    parser.add_argument("--completion", action=Completion)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(_command(commands, "demo", "sample and invert with both shipped models, compare, draw"))
    _add_sample(_command(commands, "sample", "make images, all time steps in parallel or one after the other"))
    _add_invert(_command(commands, "invert", "find the latents that real images come from"))
    _add_edit(_command(commands, "edit", "change latents: walk from one to another, vary each, ask for a class"))
    _add_fit(_command(commands, "fit", "train a model on pictures of your own, or on the shipped data"))
    _add_report(_command(commands, "report", "measure the paper's figures and tables anew, as one HTML page"))
    _add_classifier(_command(commands, "classifier", "train the classifier in whose features the report measures"))
    _command(commands, "doctor", "say what is installed and what to change", writes=False)
    return parser


def _command(commands: Any, name: str, purpose: str, writes: bool = True) -> argparse.ArgumentParser:
    line = next(line for line in EPILOG.splitlines() if line.startswith(f"  deq-ddim {name}"))
    example = line.strip().split("  ")[0]
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", epilog=f"example: {example}"
    )
    add = command.add_argument
    if writes:
        add("-o", "--output", default=f"{name}-output", metavar="FOLDER", help="where files go (default %(default)s)")
        add("--seed", type=whole(0), default=0, help="of everything random (default 0)")
    if name in ("demo", "sample", "edit", "classifier"):
        add("--overwrite", action="store_true", help="replace what an earlier run left in the folder")
    add("--threads", type=whole(1), help="threads that torch uses (default: torch's own; demo measures which is best)")
    add("--json", action="store_true", help="print the summary as JSON on standard output, all else on standard error")
    add("--debug", action="store_true", help="show where an error arose")
    return command


def _add_chain(add: Callable[..., Any], model: str | None, steps: int, recorded: bool) -> None:
    """The chain's options, whose defaults are those of the latents where these are `recorded` ones."""
    latents, lists = ("that of the latents, else ", "those of the latents") if recorded else ("", "none")
    others = "that of the latents, the scheduler's" if recorded else "the scheduler's"
    add(
        "--model",
        default=model,
        metavar="NAME",
        help=f"digits, fashion, emoji, or the folder of a checkpoint or of a pipeline of diffusers "
        f"(default{': ' * recorded or ' '}{latents}digits)",
    )
    add("--steps", type=int, help=f"T, the length of the chain (default{': ' * recorded or ' '}{latents}{steps})")
    add("--spacing", metavar="NAME", help="of the time steps: linspace, leading, trailing or quadratic "
        f"(default: {others} in a folder of diffusers, else quadratic)")  # fmt: skip
    add("--timesteps", type=numbers, metavar="T,T,…", help="time steps of your own, falling, such as 999,600,300,100,0 "
        f"instead of --steps and --spacing (default: {lists})")  # fmt: skip
    add("--sigmas", type=numbers, metavar="S,S,…", help="noise before each step, falling, of a flow or another model "
        f"without a table of time steps (default: {lists})")  # fmt: skip
    add("--rule", choices=RULES, metavar="NAME", help="how the chain steps: ddim, dpmsolver++2m, or belm, which is "
        f"inverted exactly (default: {others}, else ddim)")  # fmt: skip
    add("--splitting", metavar="NAME", help="linear part that is solved exactly: epsilon, v or gaussian "
        "(default: gaussian if the checkpoint carries mean and variance of its data, else v)")  # fmt: skip
    _add_classes(add, recorded)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--no-pictures", dest="pictures", action="store_false", help="write no PNG files; needs no matplotlib")


def _add_classes(add: Callable[..., Any], recorded: bool) -> None:
    theirs = "those of the latents, else " if recorded else ""
    add("--label", type=label, nargs="+", metavar="CLASS", help="of a model by class, such as digit-classes: the class "
        f"of all images or of each, by number, or none (default: {theirs}no class)")  # fmt: skip
    theirs = "that of the latents, else " if recorded else ""
    add("--guidance", type=finite_number, metavar="SCALE", help="of classifier-free guidance to --label, 1 is none, "
        f"more follows the class more (default: {theirs}1)")  # fmt: skip
    add("--negative-label", type=label, metavar="CLASS", help="that guidance leads away from (default: "
        f"{theirs}what the checkpoint has for no class)")  # fmt: skip


def _add_demo(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", metavar="NAME", help="digits, fashion, emoji or a folder (default: digits and fashion)")
    add("--count", type=whole(1), default=16, help="images to sample (default 16); half as many are inverted")
    add("--steps", type=whole(1), help="T of sampling (default: digits 1000, others 100)")
    add("--invert-steps", type=whole(1), default=50, metavar="STEPS", help="T of inversion (default 50)")
    add("--epochs", type=whole(1), default=12, help="of naive and deq (default 12)")
    add("--lr", type=positive, default=0.1, help="of naive and deq (default 0.1)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def _add_rounds(add: Callable[..., Any]) -> None:
    add("--max-rounds", type=whole(1), help="calls of the model one after the other, at most (default: no limit)")


def _add_sample(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_chain(add, None, 100, recorded=True)
    add("--strength", type=share_or_all, metavar="SHARE", help="the last steps alone, this share of them, from "
        "pictures with noise, --images (default: that of the latents, 0.8 of pictures, else 1)")  # fmt: skip
    add("--images", nargs="+", metavar="PATH", help="pictures and folders of pictures that noise is added to, and "
        "the last steps start from (default: none)")  # fmt: skip
    add("--resize", action="store_true", help="cut and scale pictures of another size")
    add("--count", type=whole(1), help="images, at most (default: all latents or pictures that are named, else 16)")
    add("--latents", metavar="PATH", help="what invert, edit or sample wrote: its folder or its .safetensors file "
        "(default: fresh latents, from the seed)")  # fmt: skip
    add("--method", default="parallel", metavar="NAME",
        choices=("parallel", "coarse-to-fine", "all-steps", "sequential", "auto"),
        help="sequential; all-steps, in every round, or coarse-to-fine; parallel, the better of these two; auto, the "
        "fastest of all (default parallel)")  # fmt: skip
    add(
        "--eta",
        type=float,
        help="share of fresh noise: 0 is DDIM, 1 DDPM (default: that of the latents, the scheduler's, else 0)",
    )
    add("--window", type=whole(1), help="time steps evaluated at once, at most (default: all)")
    add("--error", type=positive, help="relative error allowed in the images (default 1e-3, more in 16 bits)")
    _add_rounds(add)
    add("--batch", type=whole(1), default=16, help="images at a time (default 16)")


def _add_invert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_chain(add, "digits", 50, recorded=False)
    add("--strength", type=share_or_all, metavar="SHARE", help="the last steps alone, this share of them: latents are "
        "states in which the picture still shows (default 1)")  # fmt: skip
    add("--images", nargs="+", metavar="PATH",
        help="pictures and folders of pictures (default: test images of the model)")  # fmt: skip
    add("--count", type=whole(1), help="images, at most (default: all that --images names, 8 of the model's)")
    add("--resize", action="store_true", help="cut and scale pictures of another size")
    add("--method", default="exact", choices=("ddim", "naive", "deq", "exact", "ddpm"), metavar="NAME",
        help="ddim, naive, deq or exact; or ddpm, noise maps, which sample adds again (default exact)")  # fmt: skip
    add("--eta", type=share_or_all, help="share of fresh noise of a chain that ddpm inverts, up to 1 (default 1)")
    add("--error", type=positive, help="difference per pixel, root mean square, at which exact is content "
        "(default 5e-6 for a network in float32)")  # fmt: skip
    _add_rounds(add)
    add("--epochs", type=whole(1), help="of naive and deq (default 400)")
    add("--lr", type=positive, help="learning rate of naive and deq (default 0.3 and 0.1)")
    add("--gradient", choices=("phantom", "implicit"), help="of deq (default phantom)")
    add("--batch", type=whole(1), default=8, help="images at a time (default 8)")
    add("--restart", action="store_true", help="start again, whatever the folder holds")


def _add_edit(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--latents", required=True, metavar="PATH", help="what invert, edit or sample wrote: its folder or file")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--between", nargs=2, metavar=("A", "B"),
        help="walk from one to the other on the sphere; each by its number or its name (default: none)")  # fmt: skip
    how.add_argument("--vary", type=share, metavar="SHARE",
        help="turn each by this share of the way to a fresh latent, such as 0.2 (default: none)")  # fmt: skip
    add("--count", type=whole(1), help="latents on the way, or variants of each (default 7, or 4)")
    add("--label", type=label, nargs="+", metavar="CLASS", help="classes that the images are to be of, by number, or "
        "none; alone every latent is taken once for each (default: those of the latents)")  # fmt: skip
    add("--guidance", type=finite_number, metavar="SCALE", help="of classifier-free guidance to their classes, 1 is "
        "none (default: that of the latents)")  # fmt: skip


def _add_data(add: Callable[..., Any], holding: str, more: str = "") -> None:
    add("--data", required=True, metavar="NAME", help=f"digits, {more}fashion, emoji, or a folder of {holding}")
    add("--shape", type=whole(1), nargs=3, metavar=("C", "H", "W"),
        help="what pictures of a folder are cut and scaled to (default: their own)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def _add_fit(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_data(add, "PNG or JPEG files", "digit-classes, fashion-classes (by class), ")
    add("--steps", type=whole(1), help="optimiser steps (default: digits and folders 20000, fashion 9000, "
        "digit-classes 8000, fashion-classes 6000, emoji 12000)")  # fmt: skip
    add("--lr", type=positive, help="largest learning rate (default 0.0015)")
    add("--batch", type=whole(1), help="images per step (default 64, emoji 32)")
    add("--save-every", type=whole(1), help="steps between two saves (default 1000)")
    add("--distance", type=whole(0), default=256, metavar="COUNT",
        help="images sampled in the end, to measure their Fréchet distance; 0: none (default 256)")  # fmt: skip
    add("--restart", action="store_true", help="start again, whatever the folder holds")


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", nargs="+", metavar="NAME", help="digits, fashion or folders (default: digits and fashion)")
    add("--dataset-folder", metavar="FOLDER", help="real images of one model of your own: FOLDER/train/<class>/…, "
        "FOLDER/<class>/… or pictures side by side (default: those of the shipped models)")  # fmt: skip
    add("--quick", action="store_true", help="few images, short chains: under a minute, to see that all works")
    add("--steps", type=whole(1), nargs="+", metavar="T", help="chains of Figure 1; the longest also of Table 1 "
        "(default: digits 100 1000, fashion 25 50, others 50 100)")  # fmt: skip
    add("--runs", type=whole(1), help="latents of Figure 1 (default 25)")
    add("--samples", type=whole(2), help="images per row of Table 1 (default: digits 256, others 128)")
    add("--invert-steps", type=whole(1), nargs="+", metavar="T", help="chains of Table 3 "
        "(default: digits 10 20 100, fashion 10, others 10 20)")  # fmt: skip
    add("--images", type=whole(1), help="real images inverted, at most (default: fashion 32, others 100)")
    add("--epochs", type=whole(1), help="of naive and deq (default 30)")
    add("--lr", type=positive, help="of naive and deq (default 0.3 and 0.1)")
    add("--batch", type=whole(1), help="images sampled at a time (default: digits 64, fashion 32, others 16)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def _add_classifier(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_data(add, "pictures, classes as subfolders")
    add("--steps", type=whole(1), help="optimiser steps (default: digits 600, fashion 1200, folders 1000)")
