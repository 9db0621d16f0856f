"""The summary of a command as plain text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .output import counted

HEADER = "{:<10} {:<11} {:>8} {:>11} {:>10} {:>8}"
SAMPLING = "{:<10} {:<11} {:>8g} {:>11,.0f} {:>10.3f} {:>8d}"
INVERSION_HEADER = "{:<10} {:>7} {:>7} {:>11} {:>12} {:>10} {:>9} {:>8}"
INVERSION = "{:<10} {:>7} {:>7,d} {:>11,.0f} {:>12.1e} {:>10.1e} {:>9.1f} {:>8d}"


def table(summary: dict[str, Any]) -> str:
    """Return the summary of a command, several lines."""
    kinds = {
        "demo": _demo, "sample": _sample, "invert": _invert, "edit": _edit, "fit": _fit, "report": _report,
        "classifier": _classifier, "doctor": _doctor,
    }  # fmt: skip
    return "\n".join(kinds[summary["command"]](summary))


def _sample(s: dict[str, Any]) -> list[str]:
    return [
        f"{counted(s['images'], 'image')} from {s['model']}, T = {s['steps']}, {s['method']}, seed {s['seed']}",
        f"{_cost(s)}, {s['converged']} of {s['images']} converged",
        _files(s),
    ]


def _cost(s: dict[str, Any]) -> str:
    evaluations = f"{s['evaluations_per_image']:,.0f} network evaluations per image"
    return f"{counted(s['rounds'], 'round')}, {evaluations}, {s['seconds']:.2f} s"


def _invert(s: dict[str, Any]) -> list[str]:
    settings = s["settings"]
    exact = settings["method"] == "exact"  # the others do not aim at a tolerance
    wide = max([5, *(len(name) for name in s["names"])])
    lines = [
        f"{counted(len(s['loss']), 'image')}, {settings['model']}, T = {settings['steps']}, {settings['method']}",
        _cost(s),
        f"{'image':<{wide}}         loss   |x_T|²/D{'   status' if exact else ''}",
    ]
    columns = zip(s["names"], s["loss"], s["typicality"], s["status"], strict=True)
    lines += [
        f"{name:<{wide}} {loss:>12.3e} {size:>10.3f}{f'   {status}' * exact}" for name, loss, size, status in columns
    ]
    again = f"deq-ddim sample --model {settings['model']} --latents {s['output']}"
    edit = f"deq-ddim edit --latents {s['output']} --between 1 {len(s['names'])}"
    return [*lines, _files(s), f"next: {edit if len(s['names']) > 1 else again}"]


def _edit(s: dict[str, Any]) -> list[str]:
    return [
        f"{counted(s['latents'], 'latent')}: {s['names'][0]} … {s['names'][-1]}",
        f"next: deq-ddim sample --model {s['chain'].get('model', 'NAME')} --latents {s['output']}",
    ]


def _fit(s: dict[str, Any]) -> list[str]:
    size = "x".join(map(str, s["shape"]))
    lines = [
        f"{s['data']}: {size}, {counted(s['steps'], 'step')}, {s['parameters']:,} parameters, loss {s['loss']:.4f}, "
        f"{s['seconds']:.0f} s"
    ]
    distance = s["distance"]
    if distance:
        real = (
            f"; of {distance['real_images']} real ones {distance['real']:.3g}" if distance["real"] is not None else ""
        )
        lines.append(
            f"Fréchet distance of {distance['images']} sampled images from the training images: "
            f"{distance['sampled']:.3g} ± {distance['error']:.2g}{real} (in features of its own: no FID)"
        )
    return [*lines, f"next: deq-ddim sample --model {s['output']}"]


def _demo(s: dict[str, Any]) -> list[str]:
    lines = [f"{s['device']}, torch {s['torch']}, seed {s['seed']}, {s['seconds']:.0f} s in all"]
    for model in s["models"]:
        lines += ["", *_sampling(model), "", *_inversion(model)]
    return [*lines, "", _files(s)]


def _sampling(m: dict[str, Any]) -> list[str]:
    size = "x".join(map(str, m["shape"][1:]))
    lines = [
        f"{m['model']} {size}: sampling, T = {m['steps']}, {m['splitting']} splitting",
        HEADER.format("images", "method", "rounds", "evals/image", "seconds", "threads"),
    ]
    for timing in (m["single"], m["batch"]):
        for side in ("sequential", "parallel"):
            t = timing[side]
            line = SAMPLING.format(
                timing["images"] if side == "sequential" else "", side, t["rounds"], t["evaluations_per_image"],
                t["seconds"], t["threads"],
            )  # fmt: skip
            lines.append(f"{line}   {_ratio(timing['speedup'])}" if side == "parallel" else line)
    verdict = "agrees" if m["agrees"] else "DISAGREES"
    worst = max(m["single"]["error_max"], m["batch"]["error_max"])
    return [
        *lines,
        f"parallel {verdict} with sequential: relative error of the images at most {worst:.1e}",
        "evals/image: network evaluations; threads: each side at the count that was fastest; seconds: medians",
    ]


def _ratio(speedup: float) -> str:
    return f"{speedup:.2f} x as fast" if speedup >= 1 else f"{1 / speedup:.2f} x as slow"


def _inversion(m: dict[str, Any]) -> list[str]:
    inversion = m["inversion"]
    lines = [
        f"{m['model']}: inversion of {inversion['images']} real images, T = {inversion['steps']}, lr {inversion['lr']}",
        INVERSION_HEADER.format(
            "method", "epochs", "rounds", "evals/image", "loss, median", "worst", "seconds", "threads"
        ),
    ]
    for method, r in inversion["methods"].items():
        lines.append(
            INVERSION.format(
                method, r["epochs"] or "-", r["rounds"], r["evaluations_per_image"], r["loss_median"], r["loss_max"],
                r["seconds"], r["threads"],
            )
        )  # fmt: skip
    return lines


def _files(s: dict[str, Any]) -> str:
    folders = Counter(file.rpartition("/")[0] for file in s["files"] if "/" in file)
    names = [file for file in s["files"] if "/" not in file]
    names += [f"{name}/ ({counted(number, 'file')})" for name, number in folders.items()]
    return f"in {s['output']}: {', '.join(names)}"


def _report(s: dict[str, Any]) -> list[str]:
    lines = [f"measured in {s['seconds']:.0f} s"]
    for model in s["models"]:
        lines.append(f"{model['name']}, T = {model['table1']['steps']}: Fréchet distance, seconds for one image")
        for row in model["table1"]["rows"]:
            distance = "–" if row["distance"] is None else f"{row['distance']:.3g} ± {row['error']:.1g}"
            lines.append(
                f"  {row['method']:<14} {distance:>14}" + (f" {row['seconds']:>8.3f}" if "seconds" in row else "")
            )
        lines.append(f"{model['name']}: inversion of {model['images']} images, median loss")
        for row in model["table3"]:
            lines.append(f"  T = {row['steps']:<4} {row['method']:<6} {_loss(row['loss_median']):>9}")
    return [*lines, f"open {s['output']}/{s['files'][0]}"]


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _classifier(s: dict[str, Any]) -> list[str]:
    return [
        f"{s['data']}: {s['task']}, {s['train']:,} images, {s['steps']} steps, {100 * s['accuracy']:.1f} % right on "
        f"held-out images, {s['seconds']:.0f} s",
        f"{s['held_out']['images']} held-out images lie {s['held_out']['distance']:.2g} from the training images",
        _files(s),
    ]


def _doctor(s: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in s["versions"].items())
    native = f"loaded, {s['instruction_set']}" if s["native"] else f"not loaded: {s['native_error']}"
    settings = ", ".join(f"{k}={v}" for k, v in {**s["thread_variables"], "OMP_WAIT_POLICY": s["wait_policy"]}.items())
    return [
        f"python         {s['python']} in {s['prefix']}",
        f"versions       {versions}",
        f"system         {s['platform']}",
        f"processor      {s['processor']}, {s['cores']} cores",
        f"native module  {native}",
        f"CUDA kernels   {s['cuda_architectures'] or 'not built in'}; torch's CUDA: {s['torch_cuda'] or 'none'}",
        f"devices        {', '.join(s['devices']) or 'no GPU'}",
        f"threads        {s['threads']}; {settings}",
        f"checkpoints    {', '.join(s['checkpoints']) or 'none'}",
        *(f"advice: {line}" for line in s["advice"] or ["nothing stands out"]),
    ]
