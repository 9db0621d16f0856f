"""The documentation: its code runs, its pages build without a warning, and its picture is that of the code."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def code(page):
    """The page's Python blocks, at the lines where they stand, so that an error names its line."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append("" if fence or not inside else line)
        if fence:
            inside = line.strip() == "```python"
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if code(page).strip()], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        exec(compile(code(page), str(page), "exec"), {"__name__": "page"})


@pytest.mark.check
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    argv = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "maths.html").read_text(encoding="utf-8")
    assert page.count("<math") > 8
    assert not re.search(r'(src|href)="(https?:)?//(?!github\.com/pradyunsg)', page.partition("<body")[0])


@pytest.fixture(scope="module")
def architecture():
    sys.path.insert(0, str(DOCS))
    try:
        return pytest.importorskip("architecture")
    finally:
        sys.path.remove(str(DOCS))


def test_the_picture_has_every_module_and_arrows_that_are_imports(architecture):
    graph = architecture.imports(ROOT)
    shown = architecture.modules(ROOT)
    assert {name for name in graph if not name.startswith("csrc")} == set(shown)
    assert {"pydeqsolve/solve", "pydeqsolve/loop/iterate", "pydeqsolve/step/native", "diffusion/sample"} <= set(shown)
    files = {**shown, **{f"csrc/{p.name}": p for p in (ROOT / "csrc").rglob("*.*")}}
    for a, b in graph.edges:
        text, own = files[a].read_text(encoding="utf-8"), b.rpartition("/")[2]
        if b == "pydeqsolve/__init__":
            assert "from pydeqsolve import" in text, (a, b)
        elif a.startswith("csrc") or b.startswith("csrc"):
            joined = a in (architecture.NATIVE, "csrc/bindings.cpp")
            assert joined or re.search(rf'#include "([\w/.]*/)?{re.escape(own)}"', text), (a, b)
        else:
            assert re.search(rf"from \.[\w.]*({own}\b| import .*\b{own}\b)", text), (a, b)


def test_every_arrow_of_the_picture_points_down(architecture):
    graph = architecture.imports(ROOT)
    at, *_ = architecture.place(graph)
    assert [(a, b) for a, b in graph.edges if at[a][1] >= at[b][1]] == []


def test_the_picture_shows_the_arrows_of_the_design(architecture):
    graph = architecture.imports(ROOT)
    arrows = [("solve", "derivative/gradient"), ("derivative/implicit", "loop/iterate"),
              ("loop/iterate", "step/backend"), ("anderson", "step/ring")]  # fmt: skip
    for a, b in arrows:
        assert f"pydeqsolve/{b}" in architecture.networkx.descendants(graph, f"pydeqsolve/{a}")
    assert [a for a, b in graph.edges if b.startswith("csrc") and not a.startswith("csrc")] == [architecture.NATIVE]


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for package in ("pydeqsolve", "diffusion"):
        assert f".. automodule:: {package}\n   :members:\n   :imported-members:" in page


def test_the_table_of_names_mentions_names_that_exist():
    import pydeqsolve

    page = (DOCS / "torchdeq.md").read_text(encoding="utf-8")
    here = [row.split("|")[2] for row in page.splitlines() if row.startswith("| ") and row.count("|") == 3]
    called = {name for cell in here for name in re.findall(r"`([A-Za-z_]+)\(", cell)}
    assert {"Anderson", "Stop", "Picard", "spectral_radius"} <= called
    assert called - {"method"} <= set(pydeqsolve.__all__)
    for cell in re.findall(r"`([A-Z][A-Za-z]+\([^`…]*\))`", "".join(here)):
        ast.parse(cell)
