"""Gradients through `sample`: implicit equals autograd through the sequential chain; phantom is what it says."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Clip, Inpaint, Schedule, load_checkpoint, sample
from pydeqsolve import Anderson, Implicit, Neumann, Phantom, Picard, Status, Stop

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
CHAIN = SCHEDULE.chain(12)
TIGHT = 1e-10
AT_ONCE = Implicit(solver=Anderson(2, coupling="causal"), stop=Stop(rtol=1e-8))


def sequential_gradients(model, x, shift, loss):
    """Plain autograd through the steps, written out."""
    z = x
    for k in range(len(CHAIN)):
        eps = model(z, CHAIN.timesteps[k].expand(len(z)), shift)
        z = CHAIN.a[k] * z + CHAIN.c[k] * eps
    return torch.autograd.grad(loss(z), [x, shift, model.means])


def problem():
    model = Mixture(SCHEDULE, means())
    return model, latents(3, 6).requires_grad_(), latents(3, 6, seed=4).requires_grad_()


def loss(z):
    return (z * torch.arange(1, 7)).sin().sum()


@pytest.mark.parametrize("splitting", ["epsilon", "v"])
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_the_implicit_gradient_is_that_of_the_sequential_chain(splitting, method):
    model, x, shift = problem()
    expected = sequential_gradients(model, x, shift, loss)
    out = sample(model, x, CHAIN, method=method, splitting=splitting, inputs=(shift,), error=TIGHT, gradient=Implicit())
    got = torch.autograd.grad(loss(out.x_0), [x, shift, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


def test_the_trajectory_is_differentiable_too():
    model, x, _ = problem()
    out = sample(model, x, CHAIN, error=TIGHT, gradient=Implicit())
    (got,) = torch.autograd.grad(out.trajectory[:, 5].sin().sum(), x)
    z = x
    for k in range(5):
        z = CHAIN.a[k] * z + CHAIN.c[k] * model(z, CHAIN.timesteps[k].expand(3))
    (expected,) = torch.autograd.grad(z.sin().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_a_phantom_gradient_of_as_many_steps_as_the_chain_is_exact():
    model, x, shift = problem()
    expected = sequential_gradients(model, x, shift, loss)
    gradient = Phantom(steps=len(CHAIN), damping=1.0)
    out = sample(model, x, CHAIN, inputs=(shift,), error=TIGHT, gradient=gradient)
    got = torch.autograd.grad(loss(out.x_0), [x, shift, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_the_one_step_phantom_gradient_is_a_multiple_of_the_cotangent_and_calls_no_model(damping):
    model, x, _ = problem()
    out = sample(model, x, CHAIN, splitting="epsilon", gradient=Phantom(1, damping))
    rows = model.rows
    (got,) = torch.autograd.grad(loss(out.x_0), x)
    z = out.x_0.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(loss(z), z)
    multiple = damping * (CHAIN.alphas_next[-1] / CHAIN.alphas[0]).sqrt()
    torch.testing.assert_close(got, multiple * cotangent)
    assert model.rows == rows


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(1), Phantom(3, 0.5)])
def test_asking_for_a_gradient_does_not_change_the_images(gradient):
    model, x, _ = problem()
    with torch.no_grad():
        plain = sample(model, x, CHAIN).x_0
    assert torch.equal(sample(model, x, CHAIN, gradient=gradient).x_0.detach(), plain)


def test_without_a_gradient_there_is_no_graph():
    model, x, _ = problem()
    assert not sample(model, x, CHAIN).x_0.requires_grad


def test_second_derivatives_are_refused():
    model, x, _ = problem()
    out = sample(model, x, CHAIN, gradient=Implicit())
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(out.x_0.sum(), x, create_graph=True)


@pytest.mark.parametrize("gradient", [Implicit(), AT_ONCE], ids=["sweep", "at once"])
def test_cotangents_in_batches_are_refused_by_name(gradient):
    model, x, _ = problem()
    x_0 = sample(model, x, CHAIN, gradient=gradient).x_0
    with pytest.raises(NotImplementedError, match="cotangents in batches"):
        torch.autograd.grad(x_0, x, torch.ones(2, 3, 6, dtype=torch.float64), is_grads_batched=True)


@pytest.mark.parametrize("gradient", [Implicit(), AT_ONCE], ids=["sweep", "at once"])
def test_an_adjoint_of_the_chain_that_is_not_finite_is_told_and_comes_out_so(gradient):
    model, x, _ = problem()
    x = x.detach().half().requires_grad_()
    out = sample(model, x, CHAIN, gradient=gradient)
    g = torch.ones(3, 6, dtype=torch.float16)
    g[1, 2] = torch.nan
    g[2] = 6e4  # times the slope of the chain, which is more than 1.1: beyond float16
    (found,) = torch.autograd.grad(out.x_0, x, g)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()
    assert out.solution.adjoint.status[:2].tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert (out.solution.adjoint.status[2] == Status.CONVERGED) == bool(found[2].isfinite().all())


def test_a_closure_over_trainable_tensors_gets_their_gradient():
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    model, x, _ = problem()
    out = sample(lambda x, t: scale * model(x, t), x, CHAIN, error=TIGHT, gradient=Implicit())
    (got,) = torch.autograd.grad(out.x_0.sum(), scale)
    z = x
    for k in range(len(CHAIN)):
        z = CHAIN.a[k] * z + CHAIN.c[k] * scale * model(z, CHAIN.timesteps[k].expand(3))
    (expected,) = torch.autograd.grad(z.sum(), scale)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("splitting", ["epsilon", "v", "gaussian"])
@pytest.mark.parametrize("solver", [Anderson(2, coupling="causal"), Picard()])
def test_the_adjoint_of_all_steps_at_once_is_that_of_the_sweep(splitting, solver):
    model, x, shift = problem()
    expected = sequential_gradients(model, x, shift, loss)
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-8))
    out = sample(model, x, CHAIN, splitting=splitting, inputs=(shift,), error=TIGHT, gradient=gradient)
    got = torch.autograd.grad(loss(out.x_0), [x, shift, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-7 * b.norm()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_adjoint_of_all_steps_at_once_scales_with_the_loss(scale):
    model, x, _ = problem()
    chain = SCHEDULE.chain(60)
    out = sample(model, x, chain, gradient=AT_ONCE)
    (plain,) = torch.autograd.grad(loss(out.x_0), x, retain_graph=True)
    rows = out.solution.adjoint.evaluations
    (scaled,) = torch.autograd.grad(scale * loss(out.x_0), x)
    torch.testing.assert_close(scaled, scale * plain, rtol=1e-6, atol=0.0)
    assert out.solution.adjoint.evaluations.tolist() == rows.tolist()


def test_the_adjoint_of_all_steps_at_once_takes_far_fewer_rounds_than_steps():
    model, x, _ = problem()
    out = sample(model, x, SCHEDULE.chain(200), error=TIGHT, gradient=AT_ONCE)
    before = model.calls
    torch.autograd.grad(out.x_0.sum(), x)
    assert model.calls - before < 60  # 3 calls a round, of at most 256 rows each
    assert out.solution.adjoint.status.tolist() == [Status.CONVERGED] * 3


def test_images_whose_adjoint_misses_its_tolerance_are_swept():
    model, x, shift = problem()
    expected = sequential_gradients(model, x, shift, loss)
    gradient = Implicit(solver=Anderson(2, coupling="causal"), stop=Stop(rtol=1e-12, max_steps=2))
    out = sample(model, x, CHAIN, inputs=(shift,), error=TIGHT, gradient=gradient)
    got = torch.autograd.grad(loss(out.x_0), [x, shift, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()
    assert (out.solution.adjoint.evaluations > len(CHAIN)).all()


def test_the_shipped_network_has_the_gradient_of_the_sequential_chain_both_ways():
    checkpoint = load_checkpoint("digits")
    model = checkpoint.model.double()
    chain = checkpoint.schedule.chain(20)
    x = latents(2, *checkpoint.shape).requires_grad_()
    wanted = [x, *list(model.parameters())[:4]]
    z = x
    for k in range(len(chain)):
        z = chain.a[k] * z + chain.c[k] * model(z, chain.timesteps[k].expand(2))
    expected = torch.autograd.grad(z.sin().sum(), wanted)
    for gradient in (Implicit(), AT_ONCE):
        out = sample(model, x, chain, error=TIGHT, gradient=gradient)
        for a, b in zip(torch.autograd.grad(out.x_0.sin().sum(), wanted), expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("gradient", [Implicit(), AT_ONCE], ids=["sweep", "at once"])
@pytest.mark.parametrize("clip", [None, Clip(0.7), Clip(1.5, quantile=0.8)], ids=str)
def test_the_gradient_passes_noise_and_clipped_images_as_autograd_does(gradient, clip):
    model, x, _ = problem()
    schedule = Schedule(SCHEDULE.alphas_cumprod, clip=clip)
    chain = schedule.chain(12, eta=0.6)
    out = sample(model, x, chain, error=TIGHT, gradient=gradient, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad(loss(out.x_0), [x, model.means])
    noise = torch.randn(3, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    z = x
    for k in range(len(chain)):
        alpha, after, sigma = chain.alphas[k], chain.alphas_next[k], chain.sigma[k]
        eps = model(z, chain.timesteps[k].expand(3))
        clean = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        clean = clean if clip is None else clip(clean)
        z = after.sqrt() * clean + (1 - after - sigma**2).sqrt() * eps + sigma * noise[:, k]
    expected = torch.autograd.grad(loss(z), [x, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-7 * b.norm()


def test_the_gradient_passes_an_edit_and_reaches_what_it_reads():
    model, x, _ = problem()
    known = latents(3, 6, seed=8).requires_grad_()
    edit = Inpaint(CHAIN, known, torch.tensor([1.0, 1, 0, 0, 0, 0.3]), latents(3, 6, seed=9))
    out = sample(model, x, CHAIN, error=TIGHT, gradient=Implicit(), edit=edit)
    got = torch.autograd.grad(loss(out.x_0), [x, known, model.means])
    z = x
    for k in range(len(CHAIN)):
        z = CHAIN.a[k] * z + CHAIN.c[k] * model(z, CHAIN.timesteps[k].expand(3))
        z = edit(z, k + 1, torch.arange(3))
    expected = torch.autograd.grad(loss(z), [x, known, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-7 * b.norm()


@pytest.mark.parametrize(("gradient", "most"), [(Implicit(), 3), (AT_ONCE, 16)], ids=["sweep", "at once"])
def test_the_backward_pass_holds_the_graph_of_one_step_or_of_one_call(gradient, most):
    largest, kept = [], []

    class Watched(Mixture):
        def forward(self, x, t):
            if torch.is_grad_enabled():
                largest.append(len(x))
            return super().forward(x, t)

    model, x = Watched(SCHEDULE, means()), latents(3, 6).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = sample(model, x, SCHEDULE.chain(50), rows_per_call=16, gradient=gradient)
    assert sum(kept) <= 2 * out.trajectory.numel()  # the trajectory and the tensors that lead to it
    torch.autograd.grad(out.x_0.sum(), [x, model.means])
    assert max(largest) == most


@pytest.mark.parametrize(
    ("gradient", "edit"),
    [
        (Phantom(1), lambda x, k, image: x),
        (AT_ONCE, lambda x, k, image: x),
        (Implicit(solver=Anderson(2)), None),
        (Implicit(solver=Neumann(3)), None),
    ],
)
def test_a_gradient_that_the_chain_does_not_have_is_refused_by_name(gradient, edit):
    model, x, _ = problem()
    with pytest.raises(ValueError, match="gradient"):
        sample(model, x, CHAIN, gradient=gradient, edit=edit)
