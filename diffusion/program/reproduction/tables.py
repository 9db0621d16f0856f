"""Tables 1 and 3 and Figure 3 of the paper: quality and time of samples, loss and time of inversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Phantom, Status

from ...invert import Inversion, invert
from .. import pictures
from ..commands import options_of
from ..inversion import inverter_of
from ..output import say
from ..record import Record
from ..timing import measure, relative_errors, thread_counts, timed
from .figures import batches
from .ledger import Ledger, Measurement
from .subject import Subject

WAYS = {"DDPM": ("sequential", 1.0), "DDIM": ("sequential", 0.0), "parallel DDIM": ("parallel", 0.0)}
TIMED = 3  # single images whose median time is reported
INVERSIONS = ("naive", "deq", "exact")
DESCENTS = INVERSIONS[:2]
DEQ_GRADIENT = Phantom(1, 0.1)


def table1(subject: Subject, threads: int | None, ledger: Ledger) -> dict[str, Any]:
    """Return the rows of Table 1: Fréchet distance and time per image of DDPM, DDIM and parallel DDIM."""
    steps, plan = max(subject.plan.steps), subject.plan
    times = _times(subject, steps, threads, ledger)
    parts = {way: _samples(subject, steps, way, ledger) for way in WAYS}
    expected = parts["DDIM"].tensors["x_0"]
    rows = []
    for way, part in parts.items():
        rows.append({
            "method": way, "images": plan.samples, **_distance(subject, part.tensors["features"]),
            "seconds": times[way]["seconds"], "threads": times[way]["threads"], "rounds": times[way]["rounds"],
            "evaluations_per_image": part.facts["evaluations_per_image"],
            "batch_seconds": part.facts["seconds"] / plan.samples,
            "error_max": relative_errors(part.tensors["x_0"], expected).max().item() if "DDIM" in way else None,
        })  # fmt: skip
    held_out = subject.space.held_out[: plan.samples]
    rows.append({"method": "real images", "images": len(held_out), **_distance(subject, held_out)})
    return {"steps": steps, "rows": rows}


def _distance(subject: Subject, features: Tensor) -> dict[str, float | None]:
    finite = len(features) > 1 and bool(features.isfinite().all())
    space = subject.space
    return {
        "distance": space.distance(features) if finite else None, "error": space.error(features) if finite else None
    }  # fmt: skip


def _times(subject: Subject, steps: int, threads: int | None, ledger: Ledger) -> dict[str, Any]:
    """Return cost and time of one image by each way, in turn on the same latents."""

    def time_all() -> Measurement:
        runs = {way: subject.sampler(steps, method, eta) for way, (method, eta) in WAYS.items()}
        latents = [subject.latents(number, 1) for number in range(TIMED)]
        subject.sampler(2, "parallel")(latents[0])  # loads and warms what the first call needs
        return Measurement(measure(runs, latents, [threads] if threads else thread_counts(), 1)[0])

    return ledger.once(f"{subject.name}-times-T{steps}", {**subject.identity, "steps": steps}, time_all).facts


def _samples(subject: Subject, steps: int, way: str, ledger: Ledger) -> Measurement:
    """Return images and features of the plan's number of samples, batch by batch."""
    method, eta = WAYS[way]
    parts = []
    for number, count in enumerate(batches(subject.plan.samples, subject.plan.batch)):

        def one_batch(number: int = number, count: int = count) -> Measurement:
            seconds, out = timed(subject.sampler(steps, method, eta, number), subject.latents(number, count))
            facts = {"seconds": seconds, "evaluations_per_image": out.evaluations.double().mean().item()}
            return Measurement(facts, {"x_0": out.x_0, "features": subject.space.of(out.x_0.cpu())})

        settings = {**subject.identity, "steps": steps, "way": way, "number": number, "count": count}
        parts.append(
            ledger.once(f"{subject.name}-samples-T{steps}-{way.replace(' ', '-')}-{number}", settings, one_batch)
        )
    weights = torch.tensor([float(len(part.tensors["x_0"])) for part in parts])
    rows = torch.tensor([part.facts["evaluations_per_image"] for part in parts])
    facts = {
        "evaluations_per_image": (weights * rows).sum().item() / weights.sum().item(),
        "seconds": sum(part.facts["seconds"] for part in parts),
    }
    return Measurement(facts, {key: torch.cat([part.tensors[key] for part in parts]) for key in ("x_0", "features")})


def table3(subject: Subject, folder: Path, ledger: Ledger) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of Table 3, and what the pictures of Figure 3, which are written, show."""
    rows, shown = [], []
    for steps in subject.plan.invert_steps:
        records = {method: _invert(subject, steps, method, ledger) for method in INVERSIONS}
        rows += [_row(subject, steps, method, record) for method, record in records.items()]
        file = f"{subject.name}-figure3-T{steps}.png"
        curves = {method: records[method].done["history"].T for method in DESCENTS}
        exact = records["exact"].done["loss"].median().item()
        title = f"{subject.name}: inversion, T = {steps}"
        pictures.draw_curves(folder / file, title, curves, "epoch", "loss ‖x̂₀ − x₀‖²")
        shown.append({"steps": steps, "images": len(subject.images), "file": file, "exact": exact})
    return rows, shown


def _invert(subject: Subject, steps: int, method: str, ledger: Ledger) -> Record:
    """Return the record of all images inverted by a method, going on where an earlier run stopped."""
    plan, checkpoint = subject.plan, subject.checkpoint
    chain = checkpoint.schedule.chain(steps, eta=0.0)
    descent: dict[str, Any] = {"epochs": plan.epochs, "lr": plan.lr} if method in DESCENTS else {}
    chosen = inverter_of(method, plan.epochs, plan.lr, DEQ_GRADIENT)
    settings = {**subject.identity, "method": method, "steps": steps, **descent}
    place = ledger.place(f"{subject.name}-inversion-T{steps}-{method}", settings)
    place.mkdir(parents=True, exist_ok=True)
    record = Record.open(place, settings, subject.images)
    if len(record) < len(subject.images):
        say(f"measuring {place.name.rpartition('-')[0]}")

    def invert_batch(images: Tensor, number: int, state: dict[str, Tensor] | None, callback: Any) -> Inversion:
        return invert(
            checkpoint.model, images, chain, chosen, state=state, callback=callback,
            generator=torch.Generator().manual_seed(subject.seed + number), **options_of(checkpoint, chain, None),
        )  # fmt: skip

    record.run(subject.images.to(subject.device), len(subject.images), invert_batch)
    return record


def _row(subject: Subject, steps: int, method: str, record: Record) -> dict[str, Any]:
    loss = record.done["loss"]
    status = record.done["status"]
    return {
        "steps": steps, "method": method, "images": len(loss),
        "epochs": subject.plan.epochs if method in DESCENTS else None,
        "loss_mean": loss.mean().item(), "loss_sd": loss.std().item() if len(loss) > 1 else 0.0,
        "loss_median": loss.median().item(), "loss_max": loss.max().item(),
        "seconds": record.seconds / len(loss),
        "evaluations_per_image": record.done["evaluations"].double().mean().item(),
        "rounds": int(record.done["rounds"].max()),
        "converged": int((status == int(Status.CONVERGED)).sum()) if method == "exact" else None,
    }  # fmt: skip
