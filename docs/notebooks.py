"""Runs the notebooks of docs/examples and writes each, with its output, as a page and as a .ipynb.

    python docs/notebooks.py [NAME …] [--output docs/gallery]

A notebook is a script in cells: `# %% [markdown]` begins text, in comments, and `# %%` begins code. What a code cell
prints and the figures that it leaves open are its output. A script without such lines is no notebook. What is there
already and was made from the same sources is kept.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
MARK = re.compile(r"^# %%(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    text: bool  # Markdown, or else code
    source: str


@dataclass(frozen=True)
class Output:
    printed: str
    pictures: tuple[bytes, ...]  # PNG


def names() -> list[str]:
    """Return which scripts of docs/examples are notebooks."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py") if MARK.search(path.read_text(encoding="utf-8")))


def cells(source: str) -> list[Cell]:
    """Return the cells of a script."""
    marks = [*MARK.finditer(source)]
    ends = [*(mark.start() for mark in marks[1:]), len(source)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        text, body = "[markdown]" in mark[1], source[mark.end() : end].strip("\n")
        found.append(Cell(text, re.sub(r"^# ?", "", body, flags=re.MULTILINE) if text else body))
    return found


def run(parts: list[Cell], name: str, **settings: Any) -> list[Output]:
    """Return what the code cells print and draw, run in order. `settings` replace the constants of the first one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")
    space: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in parts:
        if cell.text:
            continue
        source = cell.source
        for key, value in (settings if not outputs else {}).items():
            source, found = re.subn(rf"^{key} = .*$", f"{key} = {value!r}", source, flags=re.MULTILINE)
            if found != 1:
                raise ValueError(f"{key}: a constant of the first code cell of {name} is required")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"{name}, code cell {len(outputs) + 1}", "exec"), space)
        outputs.append(Output(printed.getvalue(), tuple(drawn(pyplot))))
    return outputs


def drawn(pyplot: Any) -> list[bytes]:
    """Return all open figures as PNG, and close them."""
    pictures = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=100, bbox_inches="tight", facecolor="white")
        pictures.append(file.getvalue())
    pyplot.close("all")
    return pictures


def notebook(parts: list[Cell], outputs: list[Output], sources: str) -> dict[str, Any]:
    """Return the notebook as JSON of nbformat 4.5."""
    left, made = iter(outputs), []
    for i, cell in enumerate(parts):
        entry: dict[str, Any] = {
            "id": f"cell-{i}", "cell_type": "markdown" if cell.text else "code", "metadata": {},
            "source": cell.source.splitlines(keepends=True),
        }  # fmt: skip
        if not cell.text:
            out = next(left)
            stream = {"output_type": "stream", "name": "stdout", "text": out.printed.splitlines(keepends=True)}
            pictures = [
                {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(png).decode()}}
                for png in out.pictures
            ]
            entry |= {"execution_count": None, "outputs": [*([stream] if out.printed else []), *pictures]}
        made.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "sources": sources}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def page(name: str, parts: list[Cell], outputs: list[Output]) -> str:
    """Return the page in Markdown; its pictures are NAME-1.png and so on, beside it."""
    left, count = iter(outputs), 0
    title, _, rest = parts[0].source.partition("\n")
    program = f"python docs/examples/{name}.py"
    get = f"{{download}}`Notebook <{name}.ipynb>`, or `{program}`, which leaves its picture where it runs."
    blocks = [title, get, rest.strip()]
    for cell in parts[1:]:
        if cell.text:
            blocks.append(cell.source)
            continue
        out = next(left)
        blocks.append(f"```python\n{cell.source}\n```")
        if out.printed:
            blocks.append(f"```text\n{out.printed.rstrip()}\n```")
        for _ in out.pictures:
            count += 1
            blocks.append(f"![{title.lstrip('# ')}]({name}-{count}.png)")
    return "\n\n".join(filter(None, blocks)) + "\n"


def digest(name: str) -> str:
    """Return what stands for the sources that the output of a notebook comes from."""
    paths = [EXAMPLES / f"{name}.py", Path(__file__)]
    paths += sorted(path for package in ("pydeqsolve", "diffusion") for path in (ROOT / package).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def write(name: str, folder: Path) -> bool:
    """Write the page, its pictures and the notebook; False where they are there already."""
    target, sources = folder / f"{name}.ipynb", digest(name)
    if target.exists() and json.loads(target.read_text(encoding="utf-8"))["metadata"]["sources"] == sources:
        return False
    parts = cells((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as elsewhere:  # where the cells leave their pictures
        os.chdir(elsewhere)
        outputs = run(parts, name)
        os.chdir(ROOT)
    for old in folder.glob(f"{name}-*.png"):
        old.unlink()
    pictures = [png for out in outputs for png in out.pictures]
    for i, png in enumerate(pictures, start=1):
        (folder / f"{name}-{i}.png").write_bytes(png)
    (folder / f"{name}.md").write_text(page(name, parts, outputs), encoding="utf-8")
    target.write_text(json.dumps(notebook(parts, outputs, sources), indent=1, ensure_ascii=False), encoding="utf-8")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, if none is given")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gallery")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(ROOT))
    if unknown := sorted(set(args.names) - set(names())):
        parser.error(f"NAME: one of {', '.join(names())} is required, got {', '.join(unknown)}")
    output = args.output.resolve()
    for name in args.names or names():
        if write(name, output):
            print(f"{output / name}.ipynb")


if __name__ == "__main__":
    main()
