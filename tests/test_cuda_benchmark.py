"""The benchmark that needs a GPU: every line that can run without one does so here."""

import math
import re
import runpy
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "cuda_benchmark.py"))


def stand_in():
    """A module that answers as TorchDEQ's solver would, which the tests do not need."""
    module = types.ModuleType("torchdeq")

    def anderson_solver(fn, z, max_iter, m, tol, stop_mode):
        assert (m > 0, tol, stop_mode) == (True, 0.0, "rel")
        for _ in range(max_iter):
            z = fn(z)
        return z

    module.anderson_solver = anderson_solver
    return module


@pytest.mark.parametrize("with_peer", [True, False])
def test_every_column_is_printed_on_the_host(benchmark, capsys, with_peer):
    peer = stand_in() if with_peer else None
    with mock.patch.dict(sys.modules, dict.fromkeys(("torchdeq", "torchdeq.solver", "torchdeq.solver.anderson"), peer)):
        benchmark["main"](
            ["--device", "cpu", "--repeats", "1", "--dtype", "float32", "float16"], shapes=[(2, 3, 16), (1, 2, 1100)]
        )
    printed = capsys.readouterr().out
    assert "ON THE HOST" in printed
    rows = re.findall(r"^ +\d+, \d+, \d+(.*)$", printed, re.MULTILINE)
    figures = [[float(x) for x in row.split()] for row in rows]
    assert [len(row) for row in figures] == [6] * 4
    assert all(row[0] > 0 and row[3] > 0 for row in figures)  # of kernels and of the solver
    assert [math.isfinite(row[4]) for row in figures] == [with_peer] * 2 + [False] * 2
    assert ("TorchDEQ is not installed" in printed) != with_peer


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_fails(benchmark, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark["main"]([])
    assert exit_.value.code == 2
    assert "NO GPU HERE: NOTHING WAS MEASURED" in capsys.readouterr().err
