"""Integers of any kind are taken where one is meant; bools and floats are refused by name, and nothing is misread."""

import numpy as np
import pytest
import torch

from diffusion import FixedRows, Guided, Parallel, Schedule, load_checkpoint, sample
from diffusion.inversion.descent import Descent
from pydeqsolve import GMRES, Anderson, Broyden, Neumann, Phantom, Stop, solve

KINDS = [np.int64, np.uint8, np.int32, np.array, torch.tensor]
WRONG = [True, 3.0, np.float64(3), np.bool_(True), torch.tensor(3.0), torch.tensor(True), "3", np.array([3, 3])]
FIELDS = [
    (Stop, "max_steps"), (Stop, "check_every"), (Anderson, "memory"), (Broyden, "memory"), (Broyden, "line_search"),
    (GMRES, "restart"), (Neumann, "terms"), (Phantom, "steps"), (Parallel, "window"), (Descent, "epochs"),
    (FixedRows, "rows"),
]  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return load_checkpoint("digit-classes")


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_an_option_holds_the_int_that_it_is_given(kind, name):
    for made in KINDS:
        held = getattr(kind(**{name: made(3)}), name)
        assert (type(held), held) == (int, 3)
    for wrong in WRONG:
        with pytest.raises(TypeError, match=name):
            kind(**{name: wrong})


def test_a_small_kind_of_integer_does_not_wrap():
    z = solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), stop=Stop(rtol=1e-6, max_steps=np.uint8(200)), gradient=None)
    assert z.converged.all()
    chain = Schedule.linear(np.int16(1000)).chain(np.uint8(200))
    assert (len(chain), int(chain.timesteps[0])) == (200, 999)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_labels_of_every_kind_are_the_same_classes(digits, kind, guidance):
    model = digits.model if guidance == 1 else Guided(digits.model, guidance, digits.model.no_class)
    chain, labels = digits.schedule.chain(4), torch.tensor([3, 9])
    latent = torch.randn(2, *digits.shape, generator=torch.Generator().manual_seed(0))
    made = [sample(model, latent, chain, "sequential", inputs=(own,)).x_0 for own in (labels, labels.to(kind))]
    assert torch.equal(*made)


def test_a_null_label_that_the_kind_of_the_labels_cannot_hold_is_not_wrapped():
    seen = []

    def model(x, t, label):
        seen.append(label)
        return 0 * x

    Guided(model, 2.0, torch.tensor(1000))(torch.zeros(1, 2), torch.zeros(1), torch.tensor([7], dtype=torch.uint8))
    assert seen[0].tolist() == [1000, 7]


def test_labels_that_are_no_integers_are_refused(digits):
    latent, chain = torch.zeros(2, *digits.shape), digits.schedule.chain(4)
    for wrong in (torch.tensor([True, False]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="label: integers"):
            sample(digits.model, latent, chain, "sequential", inputs=(wrong,))


def test_a_budget_of_rounds_is_an_integer(digits):
    latent, chain = torch.zeros(1, *digits.shape), digits.schedule.chain(4)
    assert sample(digits.model, latent, chain, max_rounds=np.int64(50)).rounds <= 50
    for wrong in (True, 5.0):
        with pytest.raises(TypeError, match="max_rounds"):
            sample(digits.model, latent, chain, max_rounds=wrong)
