"""Draws which module imports which, as SVG, from the source itself: `python docs/architecture.py OUTPUT.svg`.

An arrow that follows from others is left out (transitive reduction), so what a module may use is all that lies below.
"""

import ast
import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import networkx

LEFT_OUT = (
    "diffusion/__main__", "diffusion/training/", "diffusion/program/", "pydeqsolve/testing", "pydeqsolve/comparison",
)  # fmt: skip
PITCH, ROW, HIGH, MARGIN, BAND = 128, 54, 28, 22, 46
NATIVE = "pydeqsolve/step/native"
COLOURS = {"diffusion": "#d55e00", "pydeqsolve": "#0072b2", "csrc": "#009e73"}
TITLES = {
    "diffusion": "diffusion: the DDIM chain as one fixed point",
    "pydeqsolve": "pydeqsolve: the solvers",
    "csrc": "csrc: the native step",
}


def modules(root: Path) -> dict[str, Path]:
    """Return "package/wing/module" → its file, of all that the picture shows."""
    found = {}
    for package in ("diffusion", "pydeqsolve"):
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).with_suffix("").as_posix()
            if not name.startswith(LEFT_OUT) and (path.stem != "__init__" or path.parent.name == package):
                found[name] = path
    return found


def imports(root: Path) -> networkx.DiGraph:
    """Return the graph of module → what it imports; imports for type checkers alone are left out."""
    graph, shown = networkx.DiGraph(), modules(root)
    for name, path in shown.items():
        graph.add_node(name)
        here = name.split("/")[:-1]
        for level, module, names in _relative(path):
            base = [*here[: len(here) - level + 1], *filter(None, module.split("."))]
            targets = {"/".join(base), *("/".join([*base, own]) for own in names)}
            graph.add_edges_from((name, target) for target in targets & set(shown))
        if name.startswith("diffusion/") and "pydeqsolve" in _absolute(path):
            graph.add_edge(name, "pydeqsolve/__init__")
    for path in sorted((root / "csrc").rglob("*.*")):
        graph.add_node(f"csrc/{path.name}")
        for header in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8")):
            graph.add_edge(f"csrc/{path.name}", f"csrc/{Path(header).name}")
    # joined when the program runs or is linked, which no import or include shows
    graph.add_edge(NATIVE, "csrc/bindings.cpp")
    for source in graph.nodes:
        if source.endswith((".cpp", ".cu")) and source != "csrc/bindings.cpp":
            graph.add_edge("csrc/bindings.cpp", source)
    graph.remove_edges_from([(a, b) for a, b in graph.edges if a == b])
    return graph


def _statements(path: Path) -> list[ast.stmt]:
    """Return the statements that run on import or on call, those for type checkers left out."""
    found: list[ast.stmt] = []

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                found.append(child)
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _relative(path: Path) -> list[tuple[int, str, list[str]]]:
    nodes = [n for n in _statements(path) if isinstance(n, ast.ImportFrom) and n.level]
    return [(n.level, n.module or "", [alias.name for alias in n.names]) for n in nodes]


def _absolute(path: Path) -> set[str]:
    return {n.module or "" for n in _statements(path) if isinstance(n, ast.ImportFrom) and n.level == 0}


def layers(graph: networkx.DiGraph) -> list[tuple[str, list[list[str]]]]:
    """Return, per package from the top, its rows of modules: each module lies above all that it imports."""
    bands = []
    for package in COLOURS:
        part = graph.subgraph([n for n in graph if n.startswith(package + "/")])
        rows = [sorted(row) for row in networkx.topological_generations(part.reverse())][::-1]
        bands.append((package, rows))
    return bands


def place(
    graph: networkx.DiGraph,
) -> tuple[dict[str, tuple[float, float]], list[tuple[str, float, float]], float, float]:
    """Return the middle of every box, title and extent of every band, width and height."""
    bands = layers(graph)
    width = 2 * MARGIN + PITCH * max(len(row) for _, rows in bands for row in rows)
    at: dict[str, tuple[float, float]] = {}
    extents, y = [], float(MARGIN)
    for package, rows in bands:
        top, y = y, y + BAND
        for row in rows:

            def wish(name: str) -> float:
                above = [at[n][0] for n in graph.predecessors(name) if n in at]
                return sum(above) / len(above) if above else width / 2

            ordered = sorted(row, key=wish)
            left = (width - PITCH * len(row)) / 2
            at.update({name: (left + PITCH * (i + 0.5), y) for i, name in enumerate(ordered)})
            y += ROW
        extents.append((package, top, y - ROW + HIGH))
        y += MARGIN
    return at, extents, width, y


def draw(root: Path, path: Path) -> None:
    """Write the picture of the tree at `root`."""
    graph = imports(root)
    at, extents, width, height = place(graph)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8a94a3"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
    ]
    for package, top, bottom in extents:
        lines.append(
            f'<rect x="6" y="{top:.0f}" width="{width - 12:.0f}" height="{bottom - top:.0f}" rx="8" '
            f'fill="{COLOURS[package]}" fill-opacity=".06"/><text x="{MARGIN}" y="{top + 18:.0f}" '
            f'fill="{COLOURS[package]}" font-weight="600">{TITLES[package]}</text>'
        )
    for a, b in networkx.transitive_reduction(graph).edges:
        (x1, y1), (x2, y2) = at[a], at[b]
        y1, y2 = y1 + HIGH / 2, y2 - HIGH / 2 - 1
        bend = (y2 - y1) / 2
        lines.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}" '
            'fill="none" stroke="#8a94a3" marker-end="url(#tip)"/>'
        )
    for name, (x, y) in at.items():
        package, own = name.split("/")[0], name.split("/")[-1]
        label = "public names" if own == "__init__" else own
        lines.append(
            f'<rect x="{x - 56:.0f}" y="{y - HIGH / 2:.0f}" width="112" height="{HIGH}" rx="5" fill="#fff" '
            f'stroke="{COLOURS[package]}"/><text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="#222">'
            f"{escape(label)}</text>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(__file__).parents[1], Path(sys.argv[1]))
