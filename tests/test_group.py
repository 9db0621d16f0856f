"""A state held in shards by 2 and 3 gloo ranks: the solve of one process, and errors instead of hanging."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shards
import spawned
import torch
import torch.distributed as dist

from pydeqsolve import Anderson, solve

if not dist.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """What three processes found together and two of them as a pair, and how they ended."""
    return shards.start(tmp_path_factory.mktemp("shards"))


@pytest.fixture(params=spawned.SIZES)
def found(request, everything):
    """What every rank of a group of two or three came to, by case."""
    return spawned.of_group(everything, request.param)


@torch.no_grad()
@pytest.mark.parametrize("case", shards.CASES)
def test_shards_take_the_steps_of_one_process(found, case):
    alone = shards.CASES[case](shards.Part())
    for rank in found:
        part = rank[case]
        for name in ("evaluations", "status", "rejections"):
            assert part[name].tolist() == getattr(alone, name).tolist()
        assert part["steps"] == alone.steps
        torch.testing.assert_close(part["residual"], alone.residual, rtol=1e-4, atol=1e-12)
    z = torch.cat([rank[case]["z"] for rank in found], -1)
    torch.testing.assert_close(z, alone.z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [*shards.GRADIENTS, "bad sample", "second"])
def test_gradients_are_those_of_one_process(found, case):
    gradient = shards.GRADIENTS.get(case, shards.Implicit(stop=shards.Stop(1e-10)))
    alone = shards.differentiated(shards.Part(), gradient, case == "bad sample", case == "second")
    parts = [rank["gradients"][case] for rank in found]
    scale = alone["W"].abs().max()
    torch.testing.assert_close(torch.cat([part["x"] for part in parts], -1), alone["x"], rtol=0, atol=1e-8)
    torch.testing.assert_close(sum(part["W"] for part in parts) / scale, alone["W"] / scale, rtol=0, atol=1e-8)
    for part in parts:
        assert part["status"].tolist() == alone["status"].tolist()
        if alone["products"] is not None:
            assert part["products"].tolist() == alone["products"].tolist()


def test_a_layer_divided_among_ranks_is_that_of_one_process(found):
    alone = shards.in_a_layer(shards.Part())
    for rank in found:
        assert rank["layer"]["evaluations"].tolist() == alone["evaluations"].tolist() == [1] * shards.B
    gradient = torch.cat([rank["layer"]["x"] for rank in found], -1)
    torch.testing.assert_close(gradient, alone["x"], rtol=1e-4, atol=1e-5)


def test_what_a_map_returns_besides_is_of_this_ranks_features(found):
    alone = shards.with_aux(shards.Part())
    for name in alone:
        joined = torch.cat([rank["aux"][name] for rank in found], -1)
        torch.testing.assert_close(joined, alone[name], rtol=1e-4, atol=1e-5)


def test_cells_in_tensor_parallel_and_under_fsdp_are_those_of_one_process(found):
    alone = shards.of_modules(shards.Part())
    for rank in found:
        for name in ("parallel", "fsdp"):
            assert rank["modules"][name].tolist() == alone[name].tolist()
    for name in ("x", "z"):
        joined = torch.cat([rank["modules"][name] for rank in found], -1)
        torch.testing.assert_close(joined, alone[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", shards.SOME)
def test_a_gradient_that_some_ranks_alone_ask_for_is_an_error_on_all(found, gradient):
    for rank in found:
        assert rank["depends on some"][gradient].startswith("ValueError: group: ranks differ in whether fn depends on")


@torch.no_grad()
def test_traces_and_snapshots_are_those_of_the_whole_state(found):
    alone = shards.CASES["trace"](shards.Part())
    for rank in found:
        torch.testing.assert_close(rank["trace"]["trace"], alone.trace, rtol=1e-6, atol=0, equal_nan=True)
    third = torch.cat([rank["trace"]["snapshots"][0] for rank in found], -1)
    torch.testing.assert_close(third, alone.snapshots[0], rtol=1e-12, atol=1e-12)


def test_every_rank_has_the_same_bits_of_residual_and_status(found):
    for case in shards.CASES:
        for rank in found[1:]:
            assert torch.equal(rank[case]["residual"], found[0][case]["residual"])


def test_a_step_takes_one_all_reduce_of_a_few_numbers_per_sample(found):
    for rank in found:
        seen = rank["counted"]
        assert seen["reductions"] == seen["steps"] > 5
        assert len(seen["gathers"]) == 1
        assert seen["bytes"] == 8 * (2 * 5 + 2) * shards.B


@pytest.mark.parametrize("case", shards.DIFFERENT)
def test_ranks_that_were_given_different_arguments_all_hear_which_one(found, case):
    for rank in found:
        assert re.match(
            rf"ValueError: group: ranks disagree on ([\w, ]*, )?{case.split()[0]}[,:]", rank["different"][case]
        )


def test_arguments_that_one_rank_refuses_are_an_error_on_all(found):
    assert found[1]["refused on one"].startswith("TypeError: stop must be a Stop")
    for rank in [found[0], *found[2:]]:
        assert rank["refused on one"].startswith("ValueError: group: the arguments were refused on rank 1")


def test_what_is_wrong_on_all_ranks_alike_is_said_as_of_one(found):
    for rank in found:
        assert rank["refused by all"].startswith("TypeError: stop must be a Stop")


@pytest.mark.parametrize("case", ["fails", "fails at once", "question fails", "callback fails", "product fails"])
def test_a_function_that_fails_on_one_rank_is_an_error_on_all(found, case):
    assert found[1][case] == "MemoryError: no room"
    for rank in [found[0], *found[2:]]:
        assert rank[case] == "RuntimeError: group: solve failed on rank 1; the error is reported there"


def test_a_callback_that_one_rank_has_stops_all(found):
    assert [rank["stopped"] for rank in found] == [4] * len(found)


def test_a_map_that_is_coarse_on_some_ranks_is_judged_alike_on_all(found):
    for rank in found[1:]:
        for name in ("evaluations", "status", "residual"):
            assert torch.equal(rank["coarse on some"][name], found[0]["coarse on some"][name])


def test_a_history_of_shards_is_refused_by_a_solve_without_them(found):
    for rank in found:
        assert rank["history without its group"].startswith("ValueError: z0 holds a history of ")


def test_the_group_can_be_used_again_after_such_an_error(found):
    for rank in found:
        assert torch.equal(rank["after errors"]["z"], rank["anderson II, rms"]["z"])


def test_a_silent_rank_is_an_error_within_the_time_limit(everything):
    waiting = everything[0]["lost"][0]
    assert "RuntimeError: group: a rank died or did not answer within the group's time limit" in waiting["silent"]
    assert waiting["silent seconds"] < shards.SILENCE  # the limit is 2 s


def test_a_rank_that_fails_before_it_communicates_ends_the_others_within_the_time_limit(everything):
    waiting, failed = everything[0]["lost"][:2]
    assert failed["missing"] == "MemoryError: no room"
    assert waiting["missing"].startswith("RuntimeError")


def test_a_dead_rank_is_an_error_on_the_others(everything):
    found, codes = everything
    assert codes == [0, 0, 7]
    assert len(found["lost"]) == 2
    for rank in found["lost"]:
        assert "RuntimeError: group: a rank died or did not answer" in rank["dead"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_grid_in_strips_is_solved_as_by_one_process(size):
    program = Path(__file__).parents[1] / "docs" / "examples" / "sharded_pde.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launcher, str(program), "--nodes", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"(\[[\d, ]+\]) evaluations", done.stdout)
    assert len(counts) == size + 1
    assert len(set(counts)) == 1
    errors = re.search(r"differs by (\S+), its gradient in λ by (\S+)", done.stdout).groups()
    assert float(errors[0]) < 1e-8
    assert float(errors[1]) < 1e-6


def test_something_else_than_a_group_is_refused_by_name():
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group, got str"):
        solve(lambda z: 0.5 * z, torch.ones(1, 2), solver=Anderson(), group="gloo")
