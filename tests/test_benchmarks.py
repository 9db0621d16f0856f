"""The page of counts: its numbers are those of the stored files, and a count that grows is seen."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for folder in ("docs", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))
import counts as drawn  # noqa: E402
import solver_peers  # noqa: E402

FILES = drawn.stored()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_number_changed_in_a_file_changes_on_the_page(name):
    key = {"solver_peers": "to_goal", "sampling_rounds": "rounds", "inversion_table": "rows"}[name]
    changed = copy.deepcopy(FILES)
    for row in changed[name]["rows"]:
        row[key] = 87_654
    before, after = drawn.page(FILES), drawn.page(changed)
    assert "87,654" not in before
    assert "87654" not in before
    found = after.count("87,654") + after.count("87654")
    shown = (
        sum(map(len, drawn.evaluations(FILES[name]).values())) if name == "solver_peers" else len(FILES[name]["rows"])
    )
    assert found == shown


def test_every_count_of_a_solver_stands_in_its_row_and_column():
    lines = [cells(line) for line in drawn.page(FILES).splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[0] == "problem")
    by_problem = {line[0]: dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head)}
    for row in FILES["solver_peers"]["rows"]:
        if row["solver"].startswith("pydeqsolve Broyden"):
            expected = "–" if row["to_goal"] is None else f"{row['to_goal']:,}"
            assert by_problem[row["problem"]]["Broyden"] == expected


@pytest.mark.parametrize(
    "name", ["KINSOL Roberts", "jaxopt rotation, m=14", "Chandrasekhar H, c=.99", "discrete integral"]
)
def test_the_solvers_need_no_more_evaluations_than_the_file_says(name):
    ((problem, memory, goal, budget),) = [rest for called, *rest in solver_peers.table() if called == name]
    new = []
    for label, run in solver_peers.contenders(memory).items():
        if label.startswith("pydeqsolve") and "Picard" not in label:
            fn = solver_peers.Counted(problem)
            new.append(vars(fn.row(name, label, goal, solver_peers.attempt(run, fn, goal, budget))))
    old = [row for row in FILES["solver_peers"]["rows"] if row["problem"] == name]
    measured, before = (drawn.counts({"solver_peers": {"rows": rows}}) for rows in (new, old))
    assert len(measured) == 3
    assert drawn.worse(before, measured) == []


def test_a_count_that_grows_or_is_no_longer_met_is_named():
    old = {"a": 20.0, "b": 20.0, "c": 20.0, "d": 5.0}
    new = {"a": 22.0, "b": 23.0, "c": math.inf, "e": 100.0}
    assert sorted(drawn.worse(old, new)) == ["b: 20 before, 23 now", "c: 20 before, inf now"]


def test_a_tenth_more_evaluations_of_a_sampled_image_are_seen():
    old = {"sampling_rounds": FILES["sampling_rounds"]}
    new = copy.deepcopy(old)
    new["sampling_rounds"]["rows"][-1]["evaluations_per_step"] *= 1.1
    assert len(drawn.worse(drawn.counts(old), drawn.counts(new))) == 1


def test_the_command_fails_where_a_new_run_is_worse(tmp_path):
    grown = copy.deepcopy(FILES["inversion_table"])
    grown["rows"][1]["rows"] *= 2
    (tmp_path / "inversion_table.json").write_text(json.dumps(grown), encoding="utf-8")
    argv = [sys.executable, str(ROOT / "docs" / "counts.py"), "--new", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "inversion, T = 10, exact: evaluations: 122.5 before, 245 now" in done.stdout
    assert "8 counts, 1 worse" in done.stdout
