"""`invert`: the latent it finds makes the image again."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Schedule, invert, load_checkpoint, sample
from diffusion.chain import interpolation
from diffusion.exact import SOLVER, OnNodes, joint_nodes, reversed_map, stiff_steps
from diffusion.sampler import Sampler
from pydeqsolve import Anderson, Implicit, Phantom, Status, Stop, solve

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
AT_ONCE = Implicit(solver=Anderson(2, coupling="causal"), stop=Stop(rtol=1e-8))


def images(model, chain, count=4):
    with torch.no_grad():
        return sample(model, latents(count, 6), chain, method="sequential").x_0


@pytest.mark.parametrize("steps", [10, 50, 100])
@pytest.mark.parametrize("splitting", ["v", "gaussian"])
def test_exact_inversion_of_a_mixture_reproduces_its_images(steps, splitting):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(steps)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain, "exact", splitting=splitting)
    assert found.loss.max() <= 1e-10
    again = sample(model, found.x_T, chain, method="sequential").x_0
    assert (again - x_0).square().sum(1).max() <= 1e-10
    assert found.status.tolist() == [Status.CONVERGED] * 4


def test_exact_inversion_recovers_the_latent():
    model, chain, x_T = Mixture(SCHEDULE, means()), SCHEDULE.chain(50), latents(4, 6)
    x_0 = sample(model, x_T, chain, method="sequential").x_0
    found = invert(model, x_0, chain)
    assert (found.x_T - x_T).square().mean().sqrt() <= 1e-3


def test_exact_inversion_recovers_the_latents_of_digits_where_steps_are_dense_next_to_the_image():
    checkpoint = load_checkpoint("digits")
    chain = checkpoint.schedule.chain(50, "quadratic")
    x_T = latents(8, *checkpoint.shape).float()
    with torch.no_grad():
        x_0 = sample(checkpoint.model, x_T, chain, method="sequential").x_0
    found = invert(checkpoint.model, x_0, chain)
    assert (found.x_T - x_T).square().flatten(1).mean(1).sqrt().max() <= 1e-3
    assert found.status.tolist() == [Status.CONVERGED] * 8


@pytest.mark.parametrize(("steps", "loss"), [(10, 1e-4), (20, 1e-4), (50, 1e-6), (100, 1e-6)])
def test_real_digits_come_back_from_their_latents_in_36_rounds(steps, loss):
    checkpoint = load_checkpoint("digits")
    x_0, chain = checkpoint.images[:16], checkpoint.schedule.chain(steps)
    found = invert(checkpoint.model, x_0, chain)
    assert found.loss.median() <= loss
    assert found.rounds <= 40
    assert found.evaluations.double().mean() <= 8.6 * steps  # 100 times fewer than "deq" in 400 epochs
    assert found.x_T.dtype == torch.float32
    with torch.no_grad():
        again = sample(checkpoint.model, found.x_T, chain, method="sequential").x_0
    assert (again - x_0).double().square().flatten(1).sum(1).median() <= loss


def test_the_last_steps_of_a_coarse_chain_are_solved_by_themselves():
    counts = [stiff_steps(SCHEDULE.chain(steps)) for steps in (10, 20, 50, 100, 1000)]
    assert counts == [2, 2, 2, 2, 1]
    assert stiff_steps(Schedule.linear(1000, 1e-4, 0.02).chain(10, "trailing")) == 1


def test_a_budget_too_small_for_the_stiff_steps_leaves_them_to_the_others():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain, stop=Stop(0.0, 2e-6, max_steps=4))
    assert found.rounds == len(found.history) == 4
    assert found.status.tolist() == [Status.MAX_STEPS] * 4
    assert found.loss.isfinite().all()


def test_a_long_chain_is_checked_in_fewer_rounds_than_it_has_steps():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(300)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain)
    assert found.check < 150
    again = sample(model, found.x_T, chain, method="sequential").x_0
    torch.testing.assert_close(found.loss, (again - x_0).square().sum(1), rtol=0.1, atol=1e-10)


def test_an_image_that_exact_inversion_misses_is_never_worse_than_one_pass():
    checkpoint = load_checkpoint("fashion")
    x_0, chain = checkpoint.images[8:9], checkpoint.schedule.chain(20)
    options = {"splitting": "gaussian", "mean": checkpoint.mean, "variance": checkpoint.variance}
    with torch.no_grad():
        exact = invert(checkpoint.model, x_0, chain, "exact", **options, stop=Stop(0.0, 2e-6, max_steps=4))
        rough = invert(checkpoint.model, x_0, chain, "ddim")
    assert exact.status.item() == Status.MAX_STEPS
    assert exact.loss.item() <= rough.loss.item() * (1 + 1e-6)


def test_one_pass_inversion_is_rough_and_costs_one_row_a_step():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(100)
    x_0 = images(model, chain)
    rough, exact = invert(model, x_0, chain, "ddim"), invert(model, x_0, chain)
    assert rough.evaluations.tolist() == [200] * 4  # the pass and the sampling that measures its loss
    assert 1e-9 < rough.loss.median() < 0.1 * x_0.square().sum(1).median()
    assert exact.loss.median() < 1e-3 * rough.loss.median()


def test_deq_comes_to_a_tenth_of_the_loss_of_naive_in_as_many_epochs():
    checkpoint = load_checkpoint("digits")
    x_0, chain = checkpoint.images[:4], checkpoint.schedule.chain(10)
    naive, deq = (
        invert(checkpoint.model, x_0, chain, method, epochs=200, generator=torch.Generator().manual_seed(0)).loss
        for method in ("naive", "deq")
    )
    assert deq.median() <= 0.1 * naive.median()


def test_the_solves_of_deq_become_finer_as_the_loss_falls():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain, "deq", epochs=200, generator=torch.Generator().manual_seed(0))
    assert found.loss.max() <= 2e-7  # solves to a relative 1e-3 stop at 1e-5
    torch.testing.assert_close(found.loss, found.history.min(0).values, rtol=0.1, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "gradient"),
    [("naive", None), ("deq", None), ("deq", Phantom(3, 1.0)), ("deq", Implicit())],
)
def test_descent_lowers_the_loss_and_reports_the_best_latent(method, gradient):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10)
    x_0 = images(model, chain)
    found = invert(
        model, x_0, chain, method, epochs=60, lr=0.1, gradient=gradient, generator=torch.Generator().manual_seed(0)
    )
    assert found.history.shape == (60, 4)
    assert (found.loss < 0.2 * found.history[0]).all()
    torch.testing.assert_close(found.loss, found.history.min(0).values, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("method", ["naive", "deq"])
def test_a_resumed_descent_ends_bit_for_bit_where_an_uninterrupted_one_does(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    whole = invert(model, x_0, chain, method, epochs=9, lr=0.1, generator=torch.Generator().manual_seed(0))
    part = invert(model, x_0, chain, method, epochs=4, lr=0.1, generator=torch.Generator().manual_seed(0))
    rest = invert(model, x_0, chain, method, epochs=9, lr=0.1, state=part.state)
    assert torch.equal(rest.x_T, whole.x_T)
    assert torch.equal(rest.history, whole.history)
    assert torch.equal(rest.evaluations, whole.evaluations)


def test_a_callback_may_stop_and_its_snapshot_resumes():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    kept = []

    def watch(epoch):
        kept.append(epoch.snapshot())
        return epoch.number == 3

    stopped = invert(model, x_0, chain, "deq", epochs=50, callback=watch, generator=torch.Generator().manual_seed(0))
    assert len(stopped.history) == len(kept) == 3
    resumed = invert(model, x_0, chain, "deq", epochs=5, state=kept[1])
    whole = invert(model, x_0, chain, "deq", epochs=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resumed.history, whole.history)


@pytest.mark.parametrize("method", ["ddim", "naive", "deq", "exact"])
def test_a_nan_image_harms_no_other(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    options = {"epochs": 3, "generator": None} if method in ("naive", "deq") else {}
    start = {"state": None}
    if options:
        options["state"] = invert(model, x_0, chain, method, epochs=0).state
        start = {}
    clean = invert(model, x_0, chain, method, **options, **start)
    x_0[2] = torch.nan
    got = invert(model, x_0, chain, method, **options, **start)
    others = [0, 1, 3]
    torch.testing.assert_close(got.x_T[others], clean.x_T[others])
    assert got.status[2] == Status.NONFINITE
    assert got.loss[others].isfinite().all()


def test_a_round_on_nodes_leaves_the_solution_where_it_is_and_costs_their_rows_alone():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(50)
    x_0 = images(model, chain)
    sampler = Sampler.of(model, x_0, chain, "epsilon", "v", None, None, (), None, None, None)
    backward, image = reversed_map(sampler.map, 0, 40, sampler.map.splitting), torch.arange(4)
    backward.evaluations = torch.zeros(4, dtype=torch.int64)
    base = backward.linear.base(x_0, None)
    with torch.no_grad():
        start, stop = torch.zeros(4, 40, 6, dtype=torch.float64), Stop(1e-12, max_steps=200)
        N = solve(backward, start, (image, base), solver=SOLVER, stop=stop, gradient=None).z
        at = joint_nodes(40)
        backward.evaluations.zero_()
        on_nodes = OnNodes(backward, at, interpolation(at, 40))
        moved = on_nodes(N, image, base)
        smooth = on_nodes(N + 1e-3, image, base) - N
    assert (moved - N).abs().max() <= 1e-9
    assert smooth.abs().max() <= 0.9e-3  # the other steps follow the nodes
    assert backward.evaluations.tolist() == [2 * len(at)] * 4
    assert len(at) < 12


def test_images_that_the_stiff_steps_leave_further_off_cost_fewer_rows():
    checkpoint = load_checkpoint("digits")
    found = invert(checkpoint.model, checkpoint.images[:16], checkpoint.schedule.chain(10))
    whole = 28 + 3 * 3 + 5 * 8 + 10  # stiff steps, rounds on nodes, rounds on all the others, the check
    assert found.evaluations.max() <= whole
    assert (found.evaluations < whole - 7).sum() >= 3


@pytest.mark.parametrize("method", ["ddim", "naive", "deq", "exact"])
def test_rounds_and_check_are_the_calls_of_the_model(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    model.calls = 0
    found = invert(model, x_0, chain, method, **({"epochs": 3} if method in ("naive", "deq") else {}))
    assert found.check == 8
    assert found.rounds + found.check == model.calls


@pytest.mark.parametrize("gradient", [Phantom(3, 0.5), Implicit(), AT_ONCE])
def test_the_rounds_of_a_descent_include_those_of_its_backward_passes(gradient):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    model.requires_grad_(False)
    x_0 = images(model, chain)
    model.calls = 0
    found = invert(model, x_0, chain, "deq", epochs=3, gradient=gradient)
    assert found.rounds + found.check == model.calls


def test_evaluations_are_the_rows_the_model_saw():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    cases = [("ddim", {}), ("exact", {}), ("naive", {"epochs": 3}), ("deq", {"epochs": 3})]
    cases += [
        ("deq", {"epochs": 3, "gradient": gradient}) for gradient in (Phantom(1), Phantom(3, 0.5), Implicit(), AT_ONCE)
    ]
    for method, options in cases:
        model.rows = 0
        found = invert(model, x_0, chain, method, **options)
        assert int(found.evaluations.sum()) == model.rows, (method, options)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"method": "guess"}, ValueError, "method"),
        ({"chain": SCHEDULE.chain(5, eta=1.0)}, ValueError, "eta"),
        ({"x_0": torch.ones(2, dtype=torch.float64)}, ValueError, "x_0"),
        ({"method": "deq", "epochs": -1}, ValueError, "epochs"),
        ({"method": "deq", "gradient": 3}, TypeError, "gradient"),
        ({"method": "deq", "state": {"x_T": torch.ones(1, 6), "N": torch.ones(1, 5, 6)}}, ValueError, "state"),
    ],
)
def test_a_wrong_argument_is_named(change, error, names):
    arguments = {"model": Mixture(SCHEDULE, means()), "x_0": latents(2, 6), "chain": SCHEDULE.chain(5), **change}
    with pytest.raises(error, match=names):
        invert(**arguments)
