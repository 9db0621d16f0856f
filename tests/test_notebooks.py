"""The notebooks of docs/examples run, do what they promise, and are written as pages and as .ipynb."""

import base64
import json
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import notebooks  # noqa: E402

sys.path.remove(str(DOCS))
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

# Constants of the first code cell, so small that each takes a second or two.
SMALL = {
    "deq_layer": {"EPOCHS": 2},
    "edit_digit": {"STEPS": 20},
    "graph_layer": {"GRAPHS": 16, "STEPS": 10},
    "interpolate": {"MODEL": "digits", "COUNT": 5},
    "kepler": {"POINTS": 30},
    "optimise_latent": {"STEPS": 20, "ITERATIONS": 8, "IMAGES": 3},
    "parallel_sampling": {"MODEL": "digits", "IMAGES": 2, "STEPS": 100},
}


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder; what its cells print, joined."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        cells = notebooks.cells((DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8"))
        outputs = notebooks.run(cells, name, **SMALL[name])
        assert sum(len(out.pictures) for out in outputs) == 1
        assert [path.suffix for path in tmp_path.iterdir()] == [".png"]
        return "".join(out.printed for out in outputs)

    return run


def numbers(pattern, text):
    return [
        float(group) for match in re.findall(pattern, text) for group in ([match] if isinstance(match, str) else match)
    ]


def test_every_notebook_is_run_by_a_test():
    assert sorted(SMALL) == notebooks.names()


def test_kepler_meets_the_formula_of_its_gradient_and_spares_evaluations(printed):
    text = printed("kepler")
    plain, mixed = numbers(r"to (\d+) evaluations", text)
    assert mixed < plain / 10
    assert numbers(r"formula: (\S+)", text)[0] < 1e-8


def test_the_deq_layer_learns_to_read_digits(printed):
    assert numbers(r"accuracy ([\d.]+)%", printed("deq_layer"))[0] > 85


def test_the_graph_layer_learns_and_every_graph_converges(printed):
    text = printed("graph_layer")
    first, last = numbers(r"loss ([\d.]+)", text)
    assert last < first / 2
    assert "by itself: Solution(16 CONVERGED" in text


def test_parallel_sampling_converges_in_few_rounds(printed):
    text = printed("parallel_sampling")
    one_by_one, at_once = numbers(r"(\d+) rounds", text)
    assert at_once < one_by_one / 5
    assert text.count("2 of 2 converged") == 2


def test_the_walk_between_two_pictures_starts_and_ends_at_them(printed):
    assert max(numbers(r"real pictures: (\S+), (\S+)\n", printed("interpolate"))) < 1e-3


def test_an_edited_digit_comes_back_with_its_own_class(printed):
    assert numbers(r"comes back: (\S+)", printed("edit_digit"))[0] < 1e-12


def test_latents_are_optimised_until_the_classifier_sees_the_target(printed):
    text = printed("optimise_latent")
    before, after = (sum(map(float, line.split(","))) for line in re.findall(r"probability of 8: ([\d., ]+)\n", text))
    assert numbers(r"classifier: ([\d.]+)%", text)[0] > 90
    assert after > before + 1


SCRIPT = """# %% [markdown]
# # Two and two
#
# It adds.

# %%
import matplotlib.pyplot as plt
A = 2
print(A + 2)

# %% [markdown]
# A line:

# %%
plt.plot([A, 2 * A])
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    (tmp_path / "adds.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "program.py").write_text("print(1)\n", encoding="utf-8")
    monkeypatch.setattr(notebooks, "EXAMPLES", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert notebooks.names() == ["adds"]
    assert notebooks.write("adds", tmp_path / "out")
    return tmp_path / "out"


def test_a_notebook_has_the_cells_of_its_script_and_their_output(written):
    made = json.loads((written / "adds.ipynb").read_text(encoding="utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == [
        ("markdown", "# Two and two\n\nIt adds."),
        ("code", "import matplotlib.pyplot as plt\nA = 2\nprint(A + 2)"),
        ("markdown", "A line:"),
        ("code", "plt.plot([A, 2 * A])"),
    ]
    assert made["cells"][1]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["4\n"]}]
    png = made["cells"][3]["outputs"][0]["data"]["image/png"]
    assert base64.b64decode(png) == (written / "adds-1.png").read_bytes()


def test_a_page_shows_code_output_and_picture_in_their_order(written):
    text = (written / "adds.md").read_text(encoding="utf-8")
    parts = [
        "# Two and two",
        "It adds.",
        "A = 2",
        "```text\n4\n```",
        "A line:",
        "plt.plot",
        "![Two and two](adds-1.png)",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_a_notebook_is_run_again_only_where_its_sources_changed(written):
    assert not notebooks.write("adds", written)
    script = notebooks.EXAMPLES / "adds.py"
    script.write_text(SCRIPT.replace("A = 2", "A = 3"), encoding="utf-8")
    assert notebooks.write("adds", written)
    assert "```text\n5\n```" in (written / "adds.md").read_text(encoding="utf-8")


def test_a_cell_that_raises_is_named():
    cells = notebooks.cells("# %%\nA = 1\n# %%\nA / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        notebooks.run(cells, "halves")
    assert raised.traceback[-1].path == Path("halves, code cell 2") or "halves, code cell 2" in str(
        raised.traceback[-1]
    )


def test_a_setting_that_is_no_constant_of_the_first_cell_is_refused():
    with pytest.raises(ValueError, match="B: a constant of the first code cell of halves is required"):
        notebooks.run(notebooks.cells("# %%\nA = 1\n"), "halves", B=2)
