"""Draws the page of counts from benchmarks/results/*.json, and says which counts of a new run are worse.

    python docs/counts.py [--output docs/gallery]
    python docs/counts.py --new FOLDER        # of files of the same names; exit code 1 where a count has grown

A count is what a method needs: evaluations or rounds. It depends on the code and hardly on the machine, which times do.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    "solver_peers": "python benchmarks/solver_peers.py",
    "sampling_rounds": (
        "python benchmarks/sampling_rounds.py --noises 8 "
        '--ways "parallel, v" "parallel, gaussian" "coarse, v" "coarse, gaussian"'
    ),
    "inversion_table": "python benchmarks/inversion_table.py --count 24 --descents 0",
}
SOLVERS = {  # column → how the solver is called in the file, its memory left out
    "Anderson": "pydeqsolve Anderson(m)",
    "Anderson, I": "pydeqsolve Anderson(m, I)",
    "Broyden": "pydeqsolve Broyden(m)",
    "Picard": "pydeqsolve Picard",
    "KINSOL": "KINSOL anderson(m)",
    "cvxgrp/aa": "cvxgrp/aa(m)",
    "TorchDEQ": "TorchDEQ anderson(m)",
    "SciPy": "SciPy anderson(m)",
}
SLACK = 1.05  # of a count, beside one more: another processor rounds otherwise


def stored(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return "name of the benchmark" → its file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def evaluations(file: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return problem → column → evaluations to the goal, infinite where it is not met."""
    found: dict[str, dict[str, float]] = {}
    for row in file["rows"]:
        called = re.sub(r"\((?:m=|M=)?\d+", "(m", row["solver"])
        for column, name in SOLVERS.items():
            if called == name:
                found.setdefault(row["problem"], {})[column] = math.inf if row["to_goal"] is None else row["to_goal"]
    return found


def counts(files: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return "what was counted" → count, of this library alone; less is better."""
    found: dict[str, float] = {}
    for problem, row in evaluations(files["solver_peers"]).items() if "solver_peers" in files else ():
        ours = {column: n for column, n in row.items() if SOLVERS[column].startswith("pydeqsolve")}
        found |= {f"{problem}, {column}: evaluations": n for column, n in ours.items()}
    for row in files.get("sampling_rounds", {"rows": ()})["rows"]:
        what = f"sampling, T = {row['steps']}, {row['way']}"
        found |= {f"{what}: rounds": row["rounds"], f"{what}: most rounds": row["most_rounds"]}
        found[f"{what}: evaluations"] = row["evaluations_per_step"] * row["steps"]
    for row in files.get("inversion_table", {"rows": ()})["rows"]:
        found[f"inversion, T = {row['steps']}, {row['method']}: evaluations"] = row["rows"]
    return found


def worse(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """Return one line per count of both that has grown by more than one and a twentieth."""
    return [
        f"{what}: {old[what]:g} before, {new[what]:g} now"
        for what in old.keys() & new.keys()
        if new[what] > SLACK * old[what] + 1
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(count: float | None) -> str:
    """Return a count as it stands on the page."""
    if count is None:
        return ""
    return "–" if math.isinf(count) else f"{count:,}"


def about(name: str, file: dict[str, Any]) -> str:
    """Return what a section was measured with."""
    versions = ("pydeqsolve", "torch", "torchdeq", "scipy", "anderson-acceleration", "KINSOL")
    present = ", ".join(f"{part} {file['about'][part]}" for part in versions if part in file["about"])
    return f"`{COMMANDS[name]} --json benchmarks/results/{name}.json` ({present})."


def page(files: dict[str, dict[str, Any]]) -> str:
    """Return the page in Markdown."""
    solvers = [
        [problem, *(cell(row.get(column)) for column in SOLVERS)]
        for problem, row in evaluations(files["solver_peers"]).items()
    ]
    sampling = [
        [
            str(row["steps"]), row["way"], f"{row['rounds']:.0f} ({row['most_rounds']:.0f})",
            f"{row['evaluations_per_step']:.2f}", f"{row['largest_error']:.1e}",
        ]
        for row in files["sampling_rounds"]["rows"]
    ]  # fmt: skip
    inversion = [
        [str(row["steps"]), f"`{row['method']}`", f"{row['loss_median']:.1e}", f"{row['rows']:,.0f}"]
        for row in files["inversion_table"]["rows"]
    ]
    blocks = [
        "# Benchmarks: counts",
        "What a method needs, drawn from `benchmarks/results/*.json`, which the commands below write. Who changes a "
        "solver writes them anew: a count that grew shows in the difference, and `python docs/counts.py --new FOLDER` "
        "names it. The tests measure some of them each time. Times: [](../results.md).",
        "## Evaluations until the residual meets the goal",
        "The memory is the same for all. – is not within the budget. In the picture, left is better.",
        "![Evaluations of eight solvers on fifteen problems](counts-1.png)",
        table(["problem", *SOLVERS], solvers),
        about("solver_peers", files["solver_peers"]),
        "## Sampling: digits, one image at a time",
        "Rounds are network calls one after the other. Evaluations are per time step: 1 is sequential sampling.",
        table(["T", "way", "rounds: median (most)", "evaluations / T", "largest error"], sampling),
        about("sampling_rounds", files["sampling_rounds"]),
        "## Inversion: 24 real digits",
        table(["T", "method", "median loss", "evaluations per image"], inversion),
        about("inversion_table", files["inversion_table"]),
    ]
    return "\n\n".join(blocks) + "\n"


def draw(files: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the picture of the evaluations: a line per problem, a mark per solver."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = evaluations(files["solver_peers"])
    figure, axis = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for number, column in enumerate(SOLVERS):
        met = [(row[column], i) for i, row in enumerate(rows.values()) if math.isfinite(row.get(column, math.inf))]
        hollow = {} if number < 4 else {"markerfacecolor": "none"}
        axis.plot(*zip(*met, strict=True), "osD^osD^"[number], label=column, color=f"C{number}", alpha=0.8, **hollow)
    axis.set(xscale="log", xlabel="evaluations to the goal", yticks=range(len(rows)), yticklabels=list(rows))
    axis.invert_yaxis()
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower right", fontsize=8, title="filled: pydeqsolve", title_fontsize=8)
    figure.savefig(path, dpi=100, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gallery")
    parser.add_argument("--new", type=Path, metavar="FOLDER", help="compare its files with the stored ones")
    args = parser.parse_args()
    files = stored()
    if args.new:
        old, new = counts(files), counts(stored(args.new))
        grown = worse(old, new)
        print("\n".join([*grown, f"{len(old.keys() & new.keys())} counts, {len(grown)} worse"]))
        sys.exit(bool(grown))
    args.output.mkdir(parents=True, exist_ok=True)
    draw(files, args.output / "counts-1.png")
    (args.output / "counts.md").write_text(page(files), encoding="utf-8")


if __name__ == "__main__":
    main()
