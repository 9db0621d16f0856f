"""How Sphinx builds these pages: no network, no scripts of others, formulas as MathML."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import architecture
from latex2mathml.converter import convert

project = "pydeqsolve"
author = "The pydeqsolve authors"
project_copyright = f"{author}, MIT licence"
version = release = metadata.version("pydeqsolve")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp"
math_number_all = False

html_theme = "furo"
html_title = f"pydeqsolve {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False


def inline_math(self: Any, node: Any) -> None:
    """Write an inline formula as MathML, which browsers draw by themselves."""
    self.body.append(convert(node.astext()))


def block_math(self: Any, node: Any) -> None:
    """Write a displayed formula as MathML: its parts side by side, on a phone one below the other."""
    parts = [part for part in re.split(r"\\q?quad\b", node.astext()) if part.strip()]
    formulas = "".join(convert(part.strip(), display="block") for part in parts)
    self.body.append(f'<div class="formula">{formulas}</div>')


def skip(*_: Any) -> None:
    """Nothing is left to do when a formula ends: the visitors above raise SkipNode through `visit`."""


def visit(write: Any) -> Any:
    """Return a visitor that writes a node and leaves its children alone."""
    from docutils.nodes import SkipNode

    def visitor(self: Any, node: Any) -> None:
        write(self, node)
        raise SkipNode

    return visitor


def escape_plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn docstrings, written as plain text with `code`, into reStructuredText in place."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        lines[i] = "".join(
            f"`{part}`" if k % 2 else re.sub(r"(?<!\\)([*|])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
            for k, part in enumerate(parts)
        )


def indented(line: str) -> int:
    """Return the number of spaces that a line begins with."""
    return len(line) - len(line.lstrip())


def set_blocks_apart(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put blank lines around indented parts of a paragraph, which reStructuredText requires, in place."""
    made: list[str] = []
    outer: list[int] = []  # indentations that an indented part returns to
    for line in lines:
        before = made[-1] if made else ""
        if line.strip() and before.strip():
            deeper = indented(line) > indented(before) and not before.lstrip().startswith((":", ".."))
            if deeper:
                outer.append(indented(before))
                made.append("")
            elif outer and indented(line) <= outer[-1]:
                outer.pop()
                made.append("")
        made.append(line)
    lines[:] = made


def without_factories(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Return a signature in which a default that is made anew each time is an ellipsis."""
    return (signature or "").replace("<factory>", "…") or signature, returns


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (visit(inline_math), skip), (visit(block_math), skip))
    app.connect("autodoc-process-docstring", escape_plain_text, priority=0)  # before napoleon, which makes markup
    app.connect("autodoc-process-docstring", set_blocks_apart, priority=900)
    app.connect("autodoc-process-signature", without_factories)
    for program in ("notebooks.py", "counts.py"):  # both write into gallery/
        subprocess.run([sys.executable, str(Path(__file__).parent / program)], check=True, stdout=subprocess.DEVNULL)
    architecture.draw(Path(__file__).parents[1], Path(__file__).parent / "_build" / "architecture.svg")
