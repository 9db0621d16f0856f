"""Sampling shared between processes: the result of one, and errors instead of hanging. gloo, 2 and 3 ranks."""

import re

import pytest
import ranks
import spawned
import torch
import torch.distributed as dist
from mixture import Mixture, latents, means

from diffusion import Parallel, sample

if not dist.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """What three processes found together and two of them as a pair, and how they ended."""
    return ranks.start(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=spawned.SIZES)
def found(request, everything):
    """What every rank of a group of two or three came to, by case."""
    return spawned.of_group(everything, request.param)


@torch.no_grad()
@pytest.mark.parametrize("case", ranks.CASES)
def test_every_rank_has_the_result_of_a_single_process_bit_for_bit(found, case):
    # The mixture computes each row by itself, so no rounding depends on which rows share a call.
    alone = ranks.run(None, **ranks.CASES[case])
    for rank in found:
        assert torch.equal(rank[case]["trajectory"], alone.trajectory)
        assert rank[case]["rounds"] == alone.rounds
        assert rank[case]["evaluations"].tolist() == alone.evaluations.tolist()


def test_each_rank_evaluates_its_share_of_the_rows(found):
    for rank in found:
        part = rank["parallel"]
        share = int(part["evaluations"].sum()) / len(found)
        assert share <= part["rows"] <= share + part["rounds"]


@torch.no_grad()
def test_a_float32_network_gives_one_result_to_its_rounding(found):
    alone = ranks.digits(None)
    for rank in found:
        assert torch.equal(rank["digits"], found[0]["digits"])
        assert (rank["digits"] - alone).norm() <= 1e-5 * alone.norm()


def test_a_model_that_fails_on_one_rank_is_an_error_on_all(found):
    assert found[1]["model fails"] == "MemoryError: no room for the rows"
    for rank in [found[0], *found[2:]]:
        assert "RuntimeError: group: the model failed on rank 1" in rank["model fails"]


@pytest.mark.parametrize("case", ranks.DIFFERENT)
def test_ranks_that_were_given_different_arguments_all_hear_which_one(found, case):
    for rank in found:
        assert re.match(rf"ValueError: group: ranks disagree on {case.split()[0]}[,:]", rank["different"][case])


def test_what_is_wrong_on_all_ranks_alike_is_said_as_of_one(found):
    for rank in found:
        assert rank["refused by all"].startswith("ValueError: method: ")


def test_a_model_that_answers_in_another_dtype_on_one_rank_is_an_error_on_all(found):
    for rank in found:
        assert "RuntimeError: group: ranks disagree on the dtype or shape of the model" in rank["dtype of the answer"]


def test_a_callback_that_one_rank_has_stops_all(found):
    def stop(step, *_):
        return step == 2

    expected = ranks.run(None, steps=40, callback=stop).rounds
    assert [rank["stopped"] for rank in found] == [expected] * len(found)


def test_a_callback_that_fails_on_one_rank_is_an_error_on_all(found):
    assert found[1]["callback fails"] == "MemoryError: no room for the rows"
    for rank in [found[0], *found[2:]]:
        assert "RuntimeError: group: the callback failed on rank 1" in rank["callback fails"]


def test_the_group_can_be_used_again_after_such_an_error(found):
    for rank in found:
        assert torch.equal(rank["after errors"], rank["parallel"]["trajectory"])


@torch.no_grad()
def test_a_model_in_ddp_with_buffers_is_sampled_by_the_group(found):
    alone = ranks.run(None, ranks.Normed().eval(), count=1, method=Parallel(window=1)).x_0
    for rank in found:
        assert torch.equal(rank["DDP shared"], alone)


@torch.no_grad()
def test_a_model_sharded_by_fsdp_is_called_alike_on_all_ranks_also_when_rows_are_fewer(found):
    alone = ranks.digits(None, method=Parallel(window=1), count=1)  # one row at a time
    for rank in found:
        assert (rank["FSDP"] - alone).norm() <= 1e-5 * alone.norm()


@torch.no_grad()
def test_ranks_that_sample_a_model_in_ddp_for_themselves_may_take_different_numbers_of_rounds(found):
    for rank, mine in enumerate(found):
        assert mine["DDP alone"] == ranks.run(None, ranks.Normed().eval(), count=1, steps=40 + 60 * rank).rounds


def test_ddp_averages_gradients_when_it_wraps_the_model_that_is_sampled(found):
    for turn in range(2):
        expected = [ranks.sampled_gradient(ranks.Normed().eval(), rank, turn) for rank in range(len(found))]
        for rank in found:
            torch.testing.assert_close(rank["DDP in sampling"][turn], torch.stack(expected).mean(0))


def test_ddp_averages_gradients_when_it_wraps_a_module_that_samples(found):
    losses = []
    for rank in range(len(found)):
        loss = ranks.SampledLoss()
        loss(latents(2, 6, seed=rank)).backward()
        losses.append(loss.model.means.grad)
    for rank in found:
        torch.testing.assert_close(rank["sampling in DDP"], torch.stack(losses).mean(0))


def test_a_gradient_of_all_steps_at_once_is_shared_too(found):
    x_T, model = latents(2, 6).requires_grad_(), Mixture(ranks.SCHEDULE, means())
    out = ranks.run(None, model, x_T=x_T, gradient=ranks.AT_ONCE)
    alone = torch.autograd.grad(out.x_0.sin().sum(), [x_T, model.means])
    for rank in found:
        torch.testing.assert_close(rank["shared gradient"], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank["swept gradient"], alone, rtol=1e-6, atol=1e-6)
        assert rank["shared products"].tolist() == out.solution.adjoint.evaluations.tolist()


def test_a_silent_rank_is_an_error_within_the_time_limit(everything):
    waiting = everything[0]["lost"][0]
    assert "RuntimeError: group: a rank died or did not answer within the group's time limit" in waiting["silent"]
    assert waiting["silent seconds"] < ranks.SILENCE  # the limit is 2 s


def test_a_dead_rank_is_an_error_on_the_others(everything):
    found, codes = everything
    assert codes == [0, 0, 7]
    assert len(found["lost"]) == 2
    for rank in found["lost"]:
        assert "RuntimeError: group: a rank died or did not answer" in rank["dead"]


@torch.no_grad()
def test_a_model_in_data_parallel_is_sampled_like_the_model():
    model = ranks.Normed().eval()
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(ranks.run(None, wrapped).trajectory, ranks.run(None, model).trajectory)


def test_something_else_than_a_group_is_refused_by_name():
    with pytest.raises(TypeError, match="group"):
        sample(Mixture(ranks.SCHEDULE, means()), latents(1, 6), ranks.SCHEDULE.chain(3), group="gloo")
