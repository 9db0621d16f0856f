"""`invert`: the latent it finds makes the image again."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Clip, Descent, OnePass, Parallel, Schedule, Sequential, invert, load_checkpoint, sample
from pydeqsolve import Anderson, Implicit, Phantom, Status, Stop

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
AT_ONCE = Implicit(solver=Anderson(2, coupling="causal"), stop=Stop(rtol=1e-8))


def images(model, chain, count=4):
    with torch.no_grad():
        return sample(model, latents(count, 6), chain, method="sequential").x_0


def descent(name, epochs, **options):
    """The descent of that name with so many epochs; any other name as it is."""
    through = {"naive": Sequential(), "deq": Parallel()}
    return Descent(through[name], epochs, **options) if name in through else name


def test_a_long_chain_is_checked_in_fewer_rounds_than_it_has_steps():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(300)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain)
    assert found.check < 150
    again = sample(model, found.x_T, chain, method="sequential").x_0
    torch.testing.assert_close(found.loss, (again - x_0).square().sum(1), rtol=0.1, atol=1e-10)


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
        invert(checkpoint.model, x_0, chain, descent(method, 200), generator=torch.Generator().manual_seed(0)).loss
        for method in ("naive", "deq")
    )
    assert deq.median() <= 0.1 * naive.median()


def test_the_solves_of_deq_become_finer_as_the_loss_falls():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain, descent("deq", 200), generator=torch.Generator().manual_seed(0))
    assert found.loss.max() <= 2e-7  # solves to a relative 1e-3 stop at 1e-5
    torch.testing.assert_close(found.loss, found.history.min(0).values, rtol=0.1, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "gradient"),
    [("naive", None), ("deq", None), ("deq", Phantom(3, 1.0)), ("deq", Implicit())],
)
def test_descent_lowers_the_loss_and_reports_the_best_latent(method, gradient):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10)
    x_0 = images(model, chain)
    chosen = descent(method, 60, lr=0.1, **({} if gradient is None else {"gradient": gradient}))
    found = invert(model, x_0, chain, chosen, generator=torch.Generator().manual_seed(0))
    assert found.history.shape == (60, 4)
    assert (found.loss < 0.2 * found.history[0]).all()
    torch.testing.assert_close(found.loss, found.history.min(0).values, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("method", ["naive", "deq"])
def test_a_resumed_descent_ends_bit_for_bit_where_an_uninterrupted_one_does(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    whole = invert(model, x_0, chain, descent(method, 9, lr=0.1), generator=torch.Generator().manual_seed(0))
    part = invert(model, x_0, chain, descent(method, 4, lr=0.1), generator=torch.Generator().manual_seed(0))
    rest = invert(model, x_0, chain, descent(method, 9, lr=0.1), state=part.state)
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

    stopped = invert(model, x_0, chain, descent("deq", 50), callback=watch, generator=torch.Generator().manual_seed(0))
    assert len(stopped.history) == len(kept) == 3
    resumed = invert(model, x_0, chain, descent("deq", 5), state=kept[1])
    whole = invert(model, x_0, chain, descent("deq", 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(resumed.history, whole.history)


@pytest.mark.parametrize("method", ["ddim", "naive", "deq", "exact"])
def test_a_nan_image_harms_no_other(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    state = invert(model, x_0, chain, descent(method, 0)).state if method in ("naive", "deq") else None
    clean = invert(model, x_0, chain, descent(method, 3), state=state)
    x_0[2] = torch.nan
    got = invert(model, x_0, chain, descent(method, 3), state=state)
    others = [0, 1, 3]
    torch.testing.assert_close(got.x_T[others], clean.x_T[others])
    assert got.status[2] == Status.NONFINITE
    assert got.loss[others].isfinite().all()


@pytest.mark.parametrize("method", ["ddim", "naive", "deq", "exact"])
def test_rounds_and_check_are_the_calls_of_the_model(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    model.calls = 0
    found = invert(model, x_0, chain, descent(method, 3))
    assert found.check == 8
    assert found.rounds + found.check == model.calls


@pytest.mark.parametrize("gradient", [Phantom(3, 0.5), Implicit(), AT_ONCE])
def test_the_rounds_of_a_descent_include_those_of_its_backward_passes(gradient):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    model.requires_grad_(False)
    x_0 = images(model, chain)
    model.calls = 0
    found = invert(model, x_0, chain, descent("deq", 3, gradient=gradient))
    assert found.rounds + found.check == model.calls


def test_evaluations_are_the_rows_the_model_saw():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    x_0 = images(model, chain)
    gradients = (Phantom(1), Phantom(3, 0.5), Implicit(), AT_ONCE)
    methods = ["ddim", "exact", descent("naive", 3), descent("deq", 3)]
    for method in [*methods, *(descent("deq", 3, gradient=gradient) for gradient in gradients)]:
        model.rows = 0
        found = invert(model, x_0, chain, method)
        assert int(found.evaluations.sum()) == model.rows, method


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"method": "guess"}, ValueError, "method"),
        ({"chain": SCHEDULE.chain(5, eta=1.0)}, ValueError, "eta"),
        ({"x_0": torch.ones(2, dtype=torch.float64)}, ValueError, "x_0"),
        ({"method": OnePass}, TypeError, "method"),
        ({"method": Sequential()}, TypeError, "method"),
        ({"method": "deq", "state": {"x_T": torch.ones(1, 6), "N": torch.ones(1, 5, 6)}}, ValueError, "state"),
    ],
)
def test_a_wrong_argument_is_named(change, error, names):
    arguments = {"model": Mixture(SCHEDULE, means()), "x_0": latents(2, 6), "chain": SCHEDULE.chain(5), **change}
    with pytest.raises(error, match=names):
        invert(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"epochs": -1}, ValueError, "epochs"),
        ({"epochs": 2.0}, TypeError, "epochs"),
        ({"gradient": 3}, TypeError, "gradient"),
        ({"through": "deq"}, TypeError, "through"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"optimizer": 3}, TypeError, "optimizer"),
    ],
)
def test_a_wrong_option_of_a_descent_is_named(options, error, names):
    with pytest.raises(error, match=names):
        Descent(**options)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"error": "small"}, TypeError, "error"),
        ({"error": True}, TypeError, "error"),
        ({"error": 0.0}, ValueError, "error"),
        ({"error": float("nan")}, ValueError, "error"),
        ({"error": -1e-3}, ValueError, "error"),
        ({"max_rounds": 2.0}, TypeError, "max_rounds"),
        ({"max_rounds": 0}, ValueError, "max_rounds"),
        ({"max_rounds": 4, "method": "ddim"}, ValueError, "max_rounds"),
    ],
)
def test_an_error_or_a_budget_that_cannot_be_asked_for_is_named(change, error, names):
    with pytest.raises(error, match=names):
        invert(Mixture(SCHEDULE, means()), latents(2, 6), SCHEDULE.chain(5), **change)


@pytest.mark.parametrize("method", ["ddim", "exact", "naive", "deq"])
def test_a_latent_is_called_converged_by_the_loss_measured_whatever_the_method(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    method, x_0, generator = descent(method, 30), images(model, chain), torch.Generator().manual_seed(0)
    found = invert(model, x_0, chain, method, error=1.0, generator=generator)
    assert found.converged.tolist() == (found.loss <= 6.0).tolist()
    assert found.converged.any()
    far = invert(model, x_0, chain, method, error=1e-18, generator=generator)
    assert not far.converged.any()
    assert (far.status != Status.NONFINITE).all()


@pytest.mark.parametrize("method", ["naive", "deq"])
def test_a_descent_begins_no_epoch_beyond_its_rounds(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8)
    found = invert(model, images(model, chain), chain, descent(method, 100), max_rounds=50)
    assert 1 <= len(found.history) < 50 // 2
    assert found.rounds <= 50


def test_the_loss_is_that_of_the_latent_returned_and_not_of_the_one_found():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10)
    x_0 = images(model, chain).bfloat16()
    for method in ("ddim", "exact", "deq"):
        found = invert(model, x_0, chain, descent(method, 20))
        again = sample(model, found.x_T, chain, method="sequential").trajectory[:, -1]
        exactly = sample(model, found.x_T.double(), chain, method="sequential").x_0
        assert again.dtype == torch.bfloat16
        torch.testing.assert_close(found.loss, (exactly - x_0.double()).square().sum(1), rtol=0.2, atol=1e-4)


def test_a_chain_that_clips_warns_and_names_the_remedy():
    schedule = Schedule(SCHEDULE.alphas_cumprod, clip=Clip(1.0))
    with pytest.warns(UserWarning, match="clip=None") as seen:
        invert(Mixture(SCHEDULE, means()), latents(1, 6), schedule.chain(5), "ddim")
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("x_0", [torch.rand(2, 1, 4, 4) * 255, torch.full((1, 3, 4, 4), -2.2)])
def test_pixels_that_are_not_scaled_warn_and_name_the_remedy(x_0):
    with pytest.warns(UserWarning, match="127.5") as seen:
        invert(lambda x, t: 0.1 * x, x_0, SCHEDULE.chain(2), "ddim")
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("x_0", [torch.full((1, 4, 4, 4), 5.0), torch.full((2, 6), 9.0), torch.ones(1, 3, 4, 4)])
def test_latents_of_an_autoencoder_vectors_and_scaled_pixels_do_not_warn(x_0):
    invert(lambda x, t: 0.1 * x, x_0, SCHEDULE.chain(2), "ddim")


def test_an_inversion_shows_itself_in_a_line():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(5)
    text = repr(invert(model, images(model, chain), chain))
    assert "4 of 4 converged" in text
    assert len(text) < 200
    assert "\n" not in text
    assert "loss none" in repr(invert(model, torch.zeros(0, 6), chain))
