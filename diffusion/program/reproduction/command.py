"""What the command `report` does, once its options are read; it returns its summary."""

from __future__ import annotations

import hashlib
import shlex
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import torch

import pydeqsolve

from ...models.files import write_json, write_text
from .. import pictures
from ..doctor import environment
from ..machine import device_of
from ..output import finite, require, writable
from .figures import figure1, figure2
from .ledger import Ledger
from .page import render
from .subject import Subject, subjects
from .tables import table1, table3

UNNAMED = ("command", "output", "json", "debug")
DEFAULTS = {"device": "auto", "seed": 0}
MEASUREMENTS, PAGE, SUMMARY = "measurements", "report.html", "report.json"


def run_report(args: Namespace) -> dict[str, Any]:
    """Measure what is not measured yet, write pictures, JSON and page, and return the summary."""
    pictures.require_matplotlib()
    require("jinja2", "Jinja writes the page", "viz")
    device = device_of(args.device)
    own = (Path(args.output) / MEASUREMENTS).is_dir()
    with writable(args.output, [PAGE, SUMMARY], own, "name another folder") as folder:
        start = time.perf_counter()
        threads = args.threads or torch.get_num_threads()
        common = {"code": code(), "torch": torch.__version__, "device": str(device), "threads": threads}
        ledger = Ledger(folder / MEASUREMENTS, common)
        try:
            models = [_study(subject, args.threads, folder, ledger) for subject in subjects(args, device, ledger)]
        except KeyboardInterrupt:
            kept = f"what was measured is kept in {ledger.folder}"
            raise KeyboardInterrupt(f"{kept}: the same command goes on from there") from None
        report: dict[str, Any] = finite({
            "command": "report", "date": date.today().isoformat(), "options": shlex.join(_options(args)),
            "device": str(device), "environment": environment(), "models": models,
            "seconds": time.perf_counter() - start, "output": str(folder), "files": [PAGE, SUMMARY, *_files(models)],
        })  # fmt: skip
        write_json(folder / SUMMARY, report)
        write_text(folder / PAGE, render(report, folder))
    return report


def code() -> str:
    """Return a digest of the source of both packages: what other code measured is measured anew."""
    digest = hashlib.sha256()
    for package in (Path(pydeqsolve.__file__).parent, Path(__file__).parents[2]):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _study(subject: Subject, threads: int | None, folder: Path, ledger: Ledger) -> dict[str, Any]:
    """Return figures and tables of one model, the pictures written."""
    figures = {"figure1": figure1(subject, folder, ledger), "figure2": figure2(subject, folder, ledger)}
    table = table1(subject, threads, ledger)
    rows, shown = table3(subject, folder, ledger)
    return {**subject.describe(), **figures, "figure3": shown, "table1": table, "table3": rows}


def _files(models: list[dict[str, Any]]) -> list[str]:
    parts = [part for m in models for part in (*m["figure1"], m["figure2"], *m["figure3"])]
    return [part["file"] for part in parts]


def _options(args: Namespace) -> list[str]:
    """Return the command line that makes this report again."""
    words = ["deq-ddim", "report"]
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in UNNAMED or value is None or value is False or value == DEFAULTS.get(name):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [option, *map(str, values)]
    return words
