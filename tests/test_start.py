"""An earlier result as the first guess: fewer evaluations, the same images to the same error."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import CoarseToFine, Inpaint, Parallel, Schedule, Sequential, Splitting, load_checkpoint, sample
from pydeqsolve import Implicit

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def errors(got, expected):
    found, right = (x.x_0.double().flatten(1) for x in (got, expected))
    return (found - right).norm(dim=1) / right.norm(dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("T", "method", "most"),
    [(30, Parallel(), 0.8), (50, Parallel(), 0.8), (100, Parallel(), 0.8), (300, Parallel(), 0.8),
     (300, CoarseToFine(), 0.9)],  # which evaluates every step once, either way
    ids=["30", "50", "100", "300", "coarse"],
)  # fmt: skip
def test_from_a_latent_three_percent_away_it_takes_less_than_four_fifths_of_the_evaluations(T, method, most):
    checkpoint = load_checkpoint("digits")
    model, chain = checkpoint.model, checkpoint.schedule.chain(T)
    x = latents(4, *checkpoint.shape, seed=1).float()
    near = x + 0.03 * latents(4, *checkpoint.shape, seed=2).float()
    cold, warm = sample(model, near, chain, method), sample(model, near, chain, method, start=sample(model, x, chain))
    assert warm.converged.all()
    assert (errors(warm, sample(model, near, chain, "sequential")) <= 1e-3).all()
    assert warm.evaluations.sum() <= most * cold.evaluations.sum()


@torch.no_grad()
@pytest.mark.parametrize("T", [20, 300])
@pytest.mark.parametrize("error", [1e-3, 1e-8])
def test_a_guess_far_off_changes_the_cost_and_not_what_is_asked_of_the_images(T, error):
    model, chain, shift = Mixture(SCHEDULE, means()), SCHEDULE.chain(T), latents(3, 6, seed=5)
    start = sample(model, latents(3, 6, seed=9), chain)
    got = sample(model, latents(3, 6), chain, inputs=(shift,), start=start, error=error)
    expected = sample(model, latents(3, 6), chain, "sequential", inputs=(shift,))
    assert got.converged.all()
    assert (errors(got, expected) <= error).all()
    assert (got.error <= error).all()


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("splitting", ["epsilon", "v", "basis"])
def test_the_result_itself_is_confirmed_in_few_rounds_whatever_the_splitting(prediction, splitting):
    model, chain = Mixture(SCHEDULE, means(size=16), prediction=prediction), SCHEDULE.chain(30)
    x = latents(2, 1, 4, 4)
    if splitting == "basis":
        images = sample(model, latents(30, 1, 4, 4, seed=3), chain, "sequential", prediction=prediction).x_0
        splitting = Splitting.fitted(chain, images, "covariance")
    start = sample(model, x, chain, "sequential", prediction=prediction)
    got = sample(model, x, chain, prediction=prediction, splitting=splitting, start=start)
    assert got.rounds <= 2
    assert (errors(got, start) <= 1e-6).all()


@torch.no_grad()
def test_fresh_noise_and_edits_are_those_of_the_new_call():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(30, eta=0.5)
    edit = Inpaint(chain, latents(3, 6, seed=4).tanh(), (torch.arange(6) < 3).double(), latents(3, 6))
    noises = [latents(3, 30, 6, seed=seed) for seed in (6, 7)]
    start = sample(model, latents(3, 6), chain, noises=noises[0], edit=edit)
    got = sample(model, latents(3, 6), chain, noises=noises[1], edit=edit, start=start, error=1e-6)
    expected = sample(model, latents(3, 6), chain, "sequential", noises=noises[1], edit=edit)
    assert (errors(got, expected) <= 1e-6).all()


@torch.no_grad()
def test_a_result_that_is_not_finite_guesses_nothing_for_its_image_and_harms_no_other():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(25), latents(3, 6)
    start = sample(model, x, chain)
    start.trajectory[1, 4:] = torch.nan
    got = sample(model, x, chain, start=start)
    assert got.converged.all()
    assert (errors(got, sample(model, x, chain, "sequential")) <= 1e-3).all()


@torch.no_grad()
def test_a_guess_is_read_and_left_as_it_is():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(300), latents(2, 6)
    start = sample(model, x, chain)
    before = start.trajectory.clone(), start.solution.z.clone()
    sample(model, 1.01 * x, chain, start=start)
    assert torch.equal(start.trajectory, before[0])
    assert torch.equal(start.solution.z, before[1])


@torch.no_grad()
def test_a_cap_on_rounds_holds_from_a_guess_too():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(300), latents(2, 6)
    start = sample(model, x, chain)
    for method in (Parallel(), CoarseToFine()):
        for most in (1, 2, 3, 5):
            got = sample(model, 1.1 * x, chain, method, start=start, max_rounds=most)
            assert got.rounds <= most


def test_the_gradient_is_that_of_the_images_found():
    model, chain, gradients = Mixture(SCHEDULE, means()), SCHEDULE.chain(12), []
    start = sample(model, latents(2, 6), chain)
    for options in ({"start": start, "error": 1e-9}, {"method": Sequential()}):
        x = latents(2, 6, seed=3).requires_grad_()
        out = sample(model, x, chain, gradient=Implicit(), **options)
        gradients.append(torch.autograd.grad(out.x_0.sin().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "start",
    [
        lambda model, x: sample(model, x, SCHEDULE.chain(9)),
        lambda model, x: sample(model, x[:1], SCHEDULE.chain(10)),
        lambda model, x: sample(model, x[:, :3], SCHEDULE.chain(10)),
    ],
    ids=["other steps", "fewer images", "other images"],
)
def test_a_start_of_another_shape_is_named(start):
    x = latents(2, 6)
    model = lambda x, t: 0.1 * x  # noqa: E731
    with pytest.raises(ValueError, match="start: a trajectory"):
        sample(model, x, SCHEDULE.chain(10), start=start(model, x))
