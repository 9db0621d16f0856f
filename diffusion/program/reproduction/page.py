"""The report as one HTML file that needs no other: tables, pictures as data, the environment they were measured in."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")

# Pokle, Geng & Kolter 2022, on the authors' GPU: Table 1 (FID, seconds) and Table 3 (loss, minutes), per image.
PAPER_TABLE1 = (
    ("CIFAR-10", 1000, ("3.17", "24.45"), ("4.07", "20.16"), ("3.79", "2.91")),
    ("CelebA", 500, ("5.32", "14.95"), ("3.66", "10.31"), ("2.92", "5.12")),
    ("LSUN Bedroom", 25, ("184.05", "1.72"), ("8.76", "1.19"), ("8.73", "3.82")),
    ("LSUN Church", 25, ("122.18", "1.77"), ("13.44", "1.68"), ("13.55", "3.99")),
)
PAPER_TABLE3 = (
    ("CIFAR-10", 100, ("15.74 ± 8.7", "49.07 ± 1.76"), ("0.76 ± 0.35", "12.99 ± 0.97")),
    ("CIFAR-10", 10, ("2.59 ± 3.67", "14.36 ± 0.26"), ("0.68 ± 0.32", "2.54 ± 0.41")),
    ("CelebA", 20, ("14.13 ± 5.04", "30.09 ± 0.57"), ("1.03 ± 0.37", "28.09 ± 1.76")),
    ("LSUN Bedroom", 10, ("1114.49 ± 795.86", "26.41 ± 0.17"), ("36.37 ± 22.86", "33.7 ± 1.05")),
    ("LSUN Church", 10, ("1674.68 ± 1432.54", "29.7 ± 0.75"), ("47.94 ± 24.78", "33.54 ± 3.02")),
)


def render(report: dict[str, Any], folder: Path) -> str:
    """Return the page of a report whose pictures lie in `folder`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(short=short, power=power)

    def picture(file: str) -> str:
        return "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode()

    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, picture=picture, paper1=PAPER_TABLE1, paper3=PAPER_TABLE3)


def short(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent where it is easily read so."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    if size >= digits:
        return f"{value:,.0f}"
    return power(value) if size < -3 else f"{value:.{digits - 1 - size}f}"


def power(value: float | None) -> str:
    """Return a number as 1.2×10⁻³."""
    if value is None or value == 0 or not math.isfinite(value):
        return "–" if value is None else f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{raised}"
