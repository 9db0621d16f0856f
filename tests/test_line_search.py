"""Broyden's line search: when steps are halved, what it costs, and what it solves that plain steps do not."""

import problems
import pytest
import torch

from pydeqsolve import Broyden, Front, Status, Stop, solve, testing

f64 = torch.float64


def cubic(B: int = 100, D: int = 6):
    """z − F(z), F = z³ + z + .3 W z − b strongly monotone: one root each, and steps from afar that overshoot."""
    g = problems.generator(0)
    W = 0.3 * torch.randn(B, D, D, dtype=f64, generator=g) / D**0.5
    b, z0 = torch.randn(B, D, dtype=f64, generator=g), torch.randn(B, D, dtype=f64, generator=g)
    return problems.Map(lambda z, W, b: z - (z**3 + z + (W @ z[..., None])[..., 0] - b), z0, None, (W, b))


@pytest.mark.parametrize(("kind", "growth"), [("good", 10.0), ("bad", 1.2)])
def test_steps_that_overshoot_a_monotone_root_are_mended(kind, growth):
    problem = cubic()
    stop = Stop(rtol=0.0, atol=1e-9, norm="l2", max_steps=200)
    plain, searched = (
        solve(problem.fn, problem.start, problem.inputs, solver=Broyden(kind=kind, safeguard=growth, line_search=k),
              stop=stop, gradient=None) for k in (0, 8)
    )  # fmt: skip
    assert searched.converged.all()
    assert plain.converged.sum() <= 90
    F = searched.z - problem.fn(searched.z, *problem.inputs)
    assert F.abs().max() < 1e-9


def test_a_trial_that_grows_the_residual_is_halved_towards_the_iterate_before():
    seen, values = [], []

    def fn(z):
        f = 0.5 * torch.sin(z) + 1 + (100.0 if len(values) in (3, 4) else 0.0)
        values.append(f)
        return f

    solve(fn, torch.zeros(1, 3, dtype=f64), solver=Broyden(line_search=3), stop=Stop(rtol=1e-10), gradient=None,
          callback=lambda step, z, residual: seen.append(z)).check()  # fmt: skip
    base, trial = seen[2], seen[3]
    torch.testing.assert_close(seen[4], base + (trial - base) / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(seen[5], base + (trial - base) / 4, rtol=1e-14, atol=0)


def values_grow_after(calls: int):
    """fn, and its arguments and values as they come; the residual of the first calls falls, then it is 100."""
    seen, values = [], []

    def fn(z):
        seen.append(z.clone())
        values.append(0.5 * torch.sin(z) + 1 + 100.0 * (len(seen) > calls))
        return values[-1]

    return fn, seen, values


def test_after_the_last_halving_the_plain_step_is_taken():
    fn, seen, values = values_grow_after(3)
    solve(fn, torch.zeros(1, 3, dtype=f64), solver=Broyden(line_search=2), stop=Stop(rtol=1e-10, max_steps=7),
          gradient=None)  # fmt: skip
    base, trial = seen[2], seen[3]
    torch.testing.assert_close(seen[5], base + (trial - base) / 4, rtol=1e-14, atol=0)
    assert torch.equal(seen[6], values[2])


def test_the_last_trial_of_a_plain_step_is_taken_as_it_is():
    fn, seen, values = values_grow_after(3)
    solve(fn, torch.zeros(1, 3, dtype=f64), solver=Broyden(line_search=2), stop=Stop(rtol=1e-10, max_steps=10),
          gradient=None)  # fmt: skip
    base, plain = seen[2], values[2]
    torch.testing.assert_close(seen[8], base + (plain - base) / 4, rtol=1e-14, atol=0)
    halfway = base + (plain - base) / 8
    assert not torch.allclose(seen[9], halfway, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 4])
def test_a_map_that_is_nan_beyond_its_first_values_ends_a_search_soon(most):
    fn, seen, _ = values_grow_after(3)
    solution = solve(lambda z: fn(z) if len(seen) < 3 else z * torch.nan, torch.zeros(1, 3, dtype=f64),
                     solver=Broyden(line_search=most), stop=Stop(rtol=1e-10), gradient=None)  # fmt: skip
    assert Status(solution.status.item()) is Status.NONFINITE
    assert solution.evaluations.item() == 3 + 2 * (most + 1)
    assert solution.z.isfinite().all()


def test_a_search_solves_every_start_of_a_poisson_mixture_and_needs_no_more_than_plain_steps():
    problem = problems.poisson_mixture(100)
    plain, searched = (
        solve(problem.fn, problem.start, solver=Broyden(line_search=k), stop=Stop(rtol=1e-7, max_steps=1000),
              gradient=None) for k in (0, 8)
    )  # fmt: skip
    assert searched.converged.all()
    assert searched.evaluations.double().mean() <= 1.1 * plain.evaluations.double().mean()


def test_a_search_costs_a_scattering_atmosphere_no_more_than_plain_steps():
    stop = Stop(rtol=0.0, atol=1e-8, norm="l2", max_steps=2000)
    totals = []
    for k in (0, 8):
        found = [
            solve(problem.fn, problem.start, solver=Broyden(line_search=k), stop=stop, gradient=None).check()
            for problem in map(problems.scattering, (1e-2, 1e-4))
        ]
        totals.append(sum(s.evaluations.item() for s in found))
    assert totals[1] <= 1.25 * totals[0]


def test_a_trial_outside_the_domain_is_halved_until_it_is_inside():
    # From 0 the plain step goes to 1, and the step after it to 10, where fn is NaN; so it is at 5.5 and 3.25.
    seen = []

    def fn(z):
        seen.append(z.item())
        inside = torch.where(z < 0.5, z + 1.0, torch.where(z < 2.2, z + 0.9, torch.nan))
        return inside

    solve(fn, torch.zeros(1, 1, dtype=f64), solver=Broyden(line_search=10), stop=Stop(rtol=1e-9, max_steps=6),
          gradient=None)  # fmt: skip
    assert seen[:3] == pytest.approx([0.0, 1.0, 10.0])
    assert seen[3:] == pytest.approx([5.5, 3.25, 2.125])


def test_a_first_step_outside_the_domain_is_halved_too():
    # sqrt of a negative number after the first, plain step.
    fn = lambda z: torch.where(z < 0, torch.nan, z - 3 * (torch.sqrt(z.clamp_min(0)) - 0.5))  # noqa: E731
    solution = solve(fn, torch.full((1, 1), 4.0, dtype=f64), solver=Broyden(line_search=8), stop=Stop(rtol=1e-10),
                     gradient=None).check()  # fmt: skip
    torch.testing.assert_close(solution.z, torch.full((1, 1), 0.25, dtype=f64), rtol=1e-8, atol=0)
    assert solution.rejections.item() >= 1


def test_when_the_flags_are_read_moves_no_sample_that_has_finished():
    fn = lambda z: torch.where(z < 0.5, z + 1.0, torch.where(z < 2, z + 0.999, z + 3.0))  # noqa: E731
    outcomes = [
        solve(fn, torch.zeros(1, 1, dtype=f64), solver=Broyden(line_search=5), gradient=None,
              stop=Stop(rtol=1e-2, check_every=k)) for k in (1, 8)
    ]  # fmt: skip
    assert outcomes[0].converged.all()
    for name in ("z", "residual", "evaluations", "status", "rejections"):
        assert torch.equal(getattr(outcomes[0], name), getattr(outcomes[1], name)), name


def test_it_goes_with_neither_a_front_nor_a_history():
    b = torch.ones(1, 3, 2, dtype=f64)
    for keywords in ({"front": Front()}, {"keep_history": True}):
        with pytest.raises(ValueError, match="line_search must be 0"):
            solve(lambda z, b: b, b * 0, (b,), solver=Broyden(line_search=2), gradient=None, **keywords)


@pytest.mark.parametrize("check_every", [1, 5])
def test_a_search_of_one_sample_changes_no_other(check_every):
    problem = cubic(8)
    testing.check_independence(
        Broyden(line_search=6), problem.fn, problem.start, problem.inputs,
        stop=Stop(rtol=1e-9, max_steps=80, check_every=check_every), bitwise=False,
    )  # fmt: skip


def test_searching_is_invariant_to_scale():
    problem = cubic(6)
    testing.check_scale_invariance(
        Broyden(line_search=6), problem.fn, problem.start, problem.inputs, stop=Stop(rtol=1e-9, max_steps=80)
    )


def test_a_negative_number_of_halvings_is_refused_by_name():
    with pytest.raises(ValueError, match="line_search must be at least 0"):
        Broyden(line_search=-1)
