"""Two-step chains: DPM-Solver++ 2M and O-BELM, against their formulas written out; exact inversion by algebra."""

import dataclasses

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import (
    Chain,
    CoarseToFine,
    Descent,
    Guided,
    Inpaint,
    OnePass,
    Schedule,
    Sequential,
    invert,
    load_checkpoint,
    sample,
)
from pydeqsolve import Anderson, Implicit, Phantom

SCHEDULE = Schedule.linear()
RULES = ("dpmsolver++2m", "belm")


def apart(x, y):
    return ((x - y).norm() / y.norm()).item()


def dpmsolver(model, x, chain):
    """Lu et al. 2022, Algorithm 2, in x_0 predictions; first order at the end without noise."""
    T, old = len(chain), None
    lam = (chain.signal / chain.noise).log()
    for k in range(T):
        alpha, sigma = chain.signal, chain.noise
        m = (x - sigma[k] * model(x, chain.timesteps[k].expand(len(x)))) / alpha[k]
        h = lam[k + 1] - lam[k]
        first = old is None or sigma[k + 1] == 0 or (k == T - 1 and T < 15)
        D = m if first else m + 0.5 * h / (lam[k] - lam[k - 1]) * (m - old)
        x, old = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * torch.expm1(-h) * D, m
    return x


def belm(model, x, chain, second=None):
    """Wang et al. 2024: the optimal two-step scheme; the first step is DDIM's."""
    alpha, s = chain.signal, chain.noise / chain.signal
    eps = lambda y, k: model(y, chain.timesteps[k].expand(len(y)))  # noqa: E731
    before, x = x, alpha[1] / alpha[0] * x + alpha[1] * (s[1] - s[0]) * eps(x, 0) if second is None else second
    for k in range(1, len(chain)):
        h1, h0 = s[k - 1] - s[k], s[k] - s[k + 1]
        after = (
            h0**2 / h1**2 * alpha[k + 1] / alpha[k - 1] * before
            + (h1**2 - h0**2) / h1**2 * alpha[k + 1] / alpha[k] * x
            - h0 * (h0 + h1) / h1 * alpha[k + 1] * eps(x, k)
        )
        before, x = x, after
    return x


WRITTEN = {"dpmsolver++2m": dpmsolver, "belm": belm}


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 9, 30])
def test_both_methods_sample_the_formula_of_the_rule(rule, spacing, steps):
    model, x, chain = Mixture(SCHEDULE, means()), latents(3, 6), SCHEDULE.chain(steps, spacing, rule=rule)
    expected = WRITTEN[rule](model, x, chain)
    for method in ("sequential", "parallel"):
        out = sample(model, x, chain, method, error=1e-9)
        assert apart(out.x_0, expected) < 1e-8, method
        assert out.converged.all()


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("splitting", ["v", "epsilon", "gaussian"])
def test_at_the_default_the_image_is_within_one_in_a_thousand_and_the_estimate_says_so(rule, splitting):
    model, x, chain = Mixture(SCHEDULE, means()), latents(4, 6), SCHEDULE.chain(40, rule=rule)
    expected = WRITTEN[rule](model, x, chain)
    out = sample(model, x, chain, splitting=splitting)
    error = (out.x_0 - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error <= out.error).all()
    assert (out.error <= 1e-3).all()
    assert out.rounds < 30


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_a_noise_level_of_its_own_at_the_end_is_reached_by_the_rule(rule):
    sigma = torch.tensor([9.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.15], dtype=torch.float64)
    chain = Chain(torch.tensor([900, 700, 500, 300, 200, 100]), torch.ones(7).double(), sigma, rule=rule)
    model = lambda x, t: torch.tanh(x / (1 + t[:, None] / 300))  # noqa: E731
    x = 9 * latents(2, 6)
    assert apart(sample(model, x, chain, "sequential").x_0, WRITTEN[rule](model, x, chain)) < 1e-12


@torch.no_grad()
def test_a_multistep_flow_from_pure_noise_starts_with_eulers_step():
    chain = Schedule.flow().chain(12, rule="dpmsolver++2m")
    model = lambda x, t: torch.tanh(x) - 0.3 * t[:, None] / 1000  # noqa: E731
    x, s = latents(2, 6), chain.noise
    out = sample(model, x, chain, "sequential", prediction="flow")
    after = x + (s[1] - s[0]) * model(x, chain.timesteps[:1])
    torch.testing.assert_close(out.trajectory[:, 1], after, rtol=1e-6, atol=1e-6)
    parallel = sample(model, x, chain, prediction="flow", error=1e-8)
    assert apart(parallel.x_0, out.x_0) < 1e-7


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_of_a_two_step_chain_is_that_of_its_steps(rule):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10, rule=rule)
    x = latents(2, 6).requires_grad_()
    WRITTEN[rule](model, x, chain).square().sum().backward()
    expected, of_means = x.grad.clone(), model.means.grad.clone()
    x.grad = model.means.grad = None
    out = sample(model, x, chain, gradient=Implicit(), error=1e-10)
    out.x_0.square().sum().backward()
    assert apart(x.grad, expected) < 1e-7
    assert apart(model.means.grad, of_means) < 1e-7


@pytest.mark.parametrize("gradient", [Phantom(1, 0.5), Implicit(solver=Anderson(2, coupling="causal"))])
def test_a_gradient_that_two_step_chains_do_not_have_is_refused(gradient):
    with pytest.raises(ValueError, match="gradient: with rule='belm' only Implicit"):
        sample(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(5, rule="belm"), gradient=gradient)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_an_earlier_result_is_a_first_guess_of_a_two_step_chain(rule):
    model, x, chain = Mixture(SCHEDULE, means()), latents(3, 6), SCHEDULE.chain(30, rule=rule)
    cold = sample(model, x, chain, error=1e-6)
    warm = sample(model, x, chain, error=1e-6, start=cold)
    assert warm.evaluations.sum() < 0.5 * cold.evaluations.sum()
    assert apart(warm.x_0, cold.x_0) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", ["ddim", "exact", OnePass()])
@pytest.mark.parametrize("spacing", ["linspace", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_belm_chain_is_inverted_to_the_last_digits(method, spacing, steps):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(steps, spacing, rule="belm")
    images = 0.7 * latents(3, 6, seed=4)
    found = invert(model, images, chain, method)
    assert found.converged.all()
    again = sample(model, found.latent, chain, "sequential").x_0
    assert (again - images).square().sum(1).max() < 1e-18
    torch.testing.assert_close((again - images).square().sum(1), found.loss, rtol=1e-3, atol=1e-22)


@torch.no_grad()
def test_a_float32_network_gives_images_back_to_eighteen_digits_in_sequence_and_nine_in_parallel():
    digits = load_checkpoint("digits")
    digits.model.requires_grad_(False)
    chain, images = digits.schedule.chain(30, rule="belm"), digits.images[:4]
    found = invert(digits.model, images, chain, OnePass())
    assert [x.dtype for x in found.latent] == [torch.float64] * 2
    assert found.rounds == 30
    assert (found.evaluations == 30 + 29).all()  # the check of the loss is one each less the step whose end is given
    again = sample(digits.model, found.latent, chain, "sequential")
    assert again.x_0.dtype == torch.float64
    assert (again.x_0 - images).square().flatten(1).sum(1).max() < 1e-18
    together = invert(digits.model, images, chain)
    assert together.loss.max() < 1e-9
    assert together.rounds < found.rounds
    back = invert(digits.model, again.x_0, chain, OnePass())
    assert apart(back.x_T, found.x_T) < 1e-8


@torch.no_grad()
def test_a_pair_of_states_is_sampled_in_parallel_and_its_given_step_not_evaluated():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(25, rule="belm")
    pair = invert(model, 0.7 * latents(2, 6, seed=4), chain, "ddim").latent
    expected = belm(model, pair[0], chain, pair[1])
    model.rows = 0
    alone = sample(model, pair, chain, "sequential")
    assert (model.rows, alone.evaluations.tolist()) == (2 * 24, [24, 24])
    model.rows = 0
    out = sample(model, pair, chain, error=1e-9)
    assert int(out.evaluations.sum()) == model.rows
    assert apart(out.x_0, expected) < 1e-8
    torch.testing.assert_close(out.trajectory[:, 1], pair[1])


@torch.no_grad()
def test_under_guidance_a_belm_chain_is_as_exact():
    mixture, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20, rule="belm")

    def conditional(x, t, shift):
        return mixture(x, t, shift)

    model, shift = Guided(conditional, 7.5, torch.zeros(6, dtype=torch.float64)), latents(2, 6, seed=9)
    images = 0.7 * latents(2, 6, seed=4)
    for method, most in (("ddim", 1e-18), ("exact", 1e-9)):
        found = invert(model, images, chain, method, inputs=(shift,))
        again = sample(model, found.latent, chain, "sequential", inputs=(shift,)).x_0
        assert (again - images).square().sum(1).max() < most


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "spacing", "steps", "most"),
    [("digits", "linspace", 50, 12), ("digits", "quadratic", 20, 13), ("fashion", "linspace", 20, 13),
     ("guided", "linspace", 20, 14), ("guided", "quadratic", 20, 14)],
)  # fmt: skip
def test_the_latents_of_a_belm_chain_are_found_to_a_thousandth_in_fourteen_rounds(name, spacing, steps, most):
    checkpoint = load_checkpoint("digit-classes" if name == "guided" else name)
    model, images = checkpoint.model.requires_grad_(False), checkpoint.images[:2]
    model, inputs = (Guided(model, 7.5, model.no_class), (torch.tensor([3, 6]),)) if name == "guided" else (model, ())
    chain = checkpoint.schedule.chain(steps, spacing, rule="belm")
    alone = invert(model, images, chain, OnePass(), inputs=inputs)
    found = invert(model, images, chain, inputs=inputs, max_rounds=most)
    assert found.rounds <= most
    assert apart(found.x_T, alone.x_T) < 1e-3


@torch.no_grad()
def test_what_rounding_keeps_a_guided_belm_chain_from_is_found_one_step_after_the_other():
    checkpoint = load_checkpoint("digit-classes")
    model = Guided(checkpoint.model.requires_grad_(False), 7.5, checkpoint.model.no_class)
    chain = checkpoint.schedule.chain(30, "quadratic", rule="belm")
    found = invert(model, checkpoint.images[:2], chain, inputs=(torch.tensor([3, 6]),))
    assert found.converged.all()
    assert found.loss.max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("most", [24, 25, 32])
def test_as_many_rounds_as_steps_are_enough_for_a_belm_chain_under_guidance(most):
    checkpoint = load_checkpoint("digit-classes")
    model = Guided(checkpoint.model.requires_grad_(False), 7.5, checkpoint.model.no_class)
    chain = checkpoint.schedule.chain(24, "quadratic", rule="belm")
    found = invert(model, checkpoint.images[:2], chain, inputs=(torch.tensor([3, 6]),), max_rounds=most)
    assert found.rounds <= most
    assert found.converged.all()


@torch.no_grad()
@pytest.mark.parametrize("most", [4, 6, 8, 9])
def test_few_rounds_of_a_belm_chain_make_what_ddim_inversion_of_all_steps_makes(most):
    digits = load_checkpoint("digits")
    model, images, schedule = digits.model.requires_grad_(False), digits.images[:3], digits.schedule
    chain = schedule.chain(20, "quadratic", rule="belm")
    plain = invert(model, images, schedule.chain(20, "quadratic"), OnePass()).x_T
    loss = (sample(model, plain, chain, "sequential").x_0 - images).square().flatten(1).sum(1)
    found = invert(model, images, chain, max_rounds=most)
    assert found.rounds <= most
    assert (found.loss < 8 * loss).all()
    assert not found.converged.any()


@torch.no_grad()
def test_on_a_linear_network_the_moves_of_neighbours_tell_the_whole_jacobian():
    M = torch.tensor([[0.5, 0.3], [-0.2, 0.4]], dtype=torch.float64)
    chain, images = SCHEDULE.chain(40, rule="belm"), latents(3, 2, seed=4)
    model = lambda x, t: x @ M.to(x)  # noqa: E731
    found = invert(model, images, chain, max_rounds=9)
    assert apart(found.x_T, invert(model, images, chain, OnePass()).x_T) < 1e-3
    assert found.loss.max() < 1e-8


@torch.no_grad()
def test_a_belm_chain_inverts_a_flow_that_starts_below_pure_noise():
    chain = Schedule.flow().chain(20, rule="ddim").tail(1)
    chain = dataclasses.replace(chain, rule="belm")
    model, images = lambda x, t: torch.tanh(x) - 0.3 * t[:, None] / 1000, 0.5 * latents(2, 6)
    found = invert(model, images, chain, "ddim", prediction="flow")
    assert found.loss.max() < 1e-18


def test_a_flow_from_pure_noise_has_no_belm_chain():
    with pytest.raises(ValueError, match=r'rule: "belm" steps by σ/α, which has no value .* a flow'):
        Schedule.flow().chain(10, rule="belm")


@torch.no_grad()
def test_an_image_that_is_not_a_number_is_alone_in_that():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(8, rule="belm")
    images = 0.7 * latents(3, 6, seed=4)
    images[1, 2] = torch.nan
    for method in ("ddim", "exact"):
        found = invert(model, images, chain, method)
        assert found.loss.isnan().tolist() == [False, True, False]
        assert found.converged.tolist() == [True, False, True]


def test_a_multistep_chain_is_inverted_by_descent_alone():
    model, chain, images = Mixture(SCHEDULE, means()), SCHEDULE.chain(6, rule="dpmsolver++2m"), latents(1, 6)
    for method in ("exact", "ddim"):
        with pytest.raises(ValueError, match='does not read chains with rule="dpmsolver'):
            invert(model, images, chain, method)
    with pytest.raises(ValueError, match="gradient: with rule='dpmsolver"):
        invert(model, images, chain, "deq")
    images = sample(model, images, chain, "sequential").x_0
    seeded = torch.Generator().manual_seed(0)
    found = invert(model, images, chain, Descent(through=Sequential(), epochs=200), generator=seeded)
    assert found.loss.item() < 0.02 * images.square().sum().item()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x, c: sample(m, x, c, edit=Inpaint(c, x, x, x)), ValueError, "edit: of chains with rule"),
        (lambda m, x, c: sample(m, x, c, CoarseToFine()), ValueError, "CoarseToFine"),
        (lambda m, x, c: sample(m, (x, x), SCHEDULE.chain(5)), ValueError, "latent: one tensor is required; a pair"),
        (lambda m, x, c: sample(m, (x, x, x), c), TypeError, "latent: a tensor, or a pair"),
        (lambda m, x, c: sample(m, (x, x[:, :3]), c), ValueError, "latent: two states of one shape"),
        (lambda m, x, c: sample(m, (x, x), c, gradient=Implicit()), ValueError, "gradient: that of a pair"),
        (lambda m, x, c: invert(m, (x, x), c), TypeError, "x_0"),
        (lambda m, x, c: invert(m, x, c, "deq"), ValueError, 'method: chains with rule="belm" are inverted by'),
        (lambda m, x, c: SCHEDULE.chain(5, eta=0.5, rule="belm"), ValueError, "rule: 'belm' has neither fresh noise"),
    ],
)  # fmt: skip
def test_what_two_step_chains_do_not_take_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(70, rule="belm"))
