"""A map inside transforms of torch.func, as a function of all that it reads: its inputs and what it closes over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..precision import Autocast
from ..problem import Problem

REACH = 4  # functions, modules and containers inside one another that are looked into
MANY = 64  # entries of a container that is
_functorch: Any = getattr(torch._C, "_functorch", None)
is_transformed = torch._C._are_functorch_transforms_active  # whether a transform of torch.func is being applied
ANOTHER = (
    "fn is evaluated again for its derivatives, and it was another map then: inside torch.func transforms keep dropout "
    "masks, parameters and closed-over variables as they were, or pass in inputs what changes"
)
HIDDEN = (
    "fn reads a tensor that it closes over past torch's functions (in compiled code, an autograd.Function, or a "
    "transform of its own), or not at its first guess: inside torch.func transforms pass it in inputs"
)


def is_wrapped(x: Tensor) -> bool:
    """Whether x stands for something else in a transform of torch.func."""
    return bool(_functorch.is_functorch_wrapped_tensor(x))


def unwrapped(x: Tensor) -> Tensor | None:
    """What x stands for in transforms; None where a vmap is among them, and it stands for many."""
    while is_wrapped(x):
        if _functorch.is_batchedtensor(x):
            return None
        inner: Tensor = _functorch.get_unwrapped(x)
        x = inner
    return x


@dataclass(frozen=True, eq=False)
class Lifted:
    """f = lifted(z, operands) for z (*lead, B, T, D): fn with all that it reads among its arguments.

    operands: the `inputs` of fn, then what it closes over that may carry derivatives or a vmapped dimension. Each has
    in front of its own shape those of the dimensions `lead` for which `has` says so.
    """

    problem: Problem
    closed: list[Tensor]  # as fn reads them
    pins: list[tuple[_Place, Tensor]]  # where it is read: modules may hold it for a while, and variables change
    call: Callable[[Tensor, Sequence[Tensor]], Tensor]
    lead: tuple[int, ...] = ()
    has: tuple[tuple[bool, ...], ...] = ()  # per dimension of `lead`, for each operand

    @staticmethod
    def of(problem: Problem, z: Tensor) -> Lifted:
        """The map of a problem, found out by two evaluations at z (B, T, D)."""
        closed = _closed_over(problem, z)
        known = {id(x) for x in closed}
        pins = [(place, x) for place in _places(problem.fn) if id(x := place.read()) in known]

        autocast = Autocast.of(z)

        def call(z: Tensor, operands: Sequence[Tensor]) -> Tensor:
            n = len(problem.inputs)
            pairs = list(zip([*problem.inputs, *closed], operands, strict=True))
            with autocast.again(), _pinned(pins), _Exchange(pairs, known) as exchange:
                f = _value(problem, z, operands[:n])
            if known - exchange.met:
                raise RuntimeError(ANOTHER)
            return f

        return Lifted(problem, closed, pins, call)

    @property
    def operands(self) -> list[Tensor]:
        """What the map was found to read."""
        return [*self.problem.inputs, *self.closed]

    def __call__(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return self.call(z, operands)

    def check(self, z: Tensor) -> None:
        """Raises NotImplementedError where fn reads more at z (B, T, D) than it was found to: a branch was missed."""
        first = _evaluation(self.problem, z)  # held, so that no identity is used twice
        new = first.read.keys() - {id(x) for x in self.closed}
        if new and new & _evaluation(self.problem, z).read.keys():
            raise NotImplementedError(HIDDEN)

    def over(self, size: int, randomness: str, has: tuple[bool, ...]) -> Lifted:
        """The map with one more dimension in front of z, and of the operands that have it."""
        dims = tuple(0 if own else None for own in has)
        inner = self.call

        def call(z: Tensor, operands: Sequence[Tensor]) -> Tensor:
            vmapped = torch.func.vmap(inner, (0, dims), randomness=randomness)
            return vmapped(z, tuple(operands))

        return Lifted(self.problem, self.closed, self.pins, call, (size, *self.lead), (has, *self.has))

    def guarded(self, z: Tensor, operands: Sequence[Tensor], good: Tensor) -> Tensor:
        """f with a good sample in the place of every one that is not good (*lead, B): zero times its NaN is NaN."""
        n = len(self.problem.inputs)
        taken = [self._taken(x, good, [has[i] for has in self.has]) for i, x in enumerate(operands[:n])]
        z = self._taken(z, good, [True] * len(self.lead)).nan_to_num(0.0, 0.0, 0.0)
        return self(z, [*taken, *operands[n:]])

    def _taken(self, x: Tensor, good: Tensor, has: list[bool]) -> Tensor:
        """x (…, B, *) with the first good sample in the place of those that are not."""
        if not good.numel():
            return x
        missing = [i for i, own in enumerate(has) if not own]
        good = good.sum(missing) > 0 if missing else good
        first = good.reshape(-1).to(torch.uint8).argmax(0, keepdim=True)
        k = good.dim()
        stand_in = x.detach().flatten(0, k - 1).index_select(0, first)[0]
        return torch.where(good.reshape(*good.shape, *[1] * (x.dim() - k)), x, stand_in)


def _value(problem: Problem, z: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """f (B, T, D) in the dtype of fn's own value, if that is one tensor: it tells the precision that fn computes in."""
    value, layout = problem.value(z, inputs), problem.layout
    if isinstance(value, Tensor) and value.is_floating_point():
        layout = replace(layout, dtype=value.dtype)
    f = layout.pack(value, "the value of fn")
    if f.shape[0] != z.shape[0]:
        raise ValueError(f"the value of fn must have {z.shape[0]} samples like its argument, got {f.shape[0]}")
    return f


class _Exchange(TorchFunctionMode):
    """Gives torch's functions one tensor for another, known by identity; `met`: those of `sought` that were read."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], sought: set[int]) -> None:
        super().__init__()
        self.by_id = {id(x): y for x, y in pairs}
        self.sought, self.met = sought, set[int]()

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [self._of(x) for x in args]
        named = {name: self._of(x) for name, x in kwargs.items()} if kwargs else {}
        return fn(*given, **named)

    def _of(self, x: Any) -> Any:
        """x, or what is to be read in its place, in containers too."""
        if isinstance(x, Tensor):
            if id(x) in self.sought:
                self.met.add(id(x))
            return self.by_id.get(id(x), x)
        return tree_map_only(Tensor, self._of, x) if isinstance(x, (tuple, list, dict)) else x


@contextmanager
def _pinned(pins: Sequence[tuple[_Place, Tensor]]) -> Iterator[None]:
    """While it is entered, places hold what they held when the map was looked into."""
    changed = [(place, x, now) for place, x in pins if (now := place.read()) is not x]
    for place, x, _ in changed:
        place.write(x)
    try:
        yield
    finally:
        for place, _, now in changed:
            place.write(now)


@dataclass(eq=False)
class _Seen:
    """What one evaluation has read and made, by identity; all of it is held so that no identity is used twice."""

    read: dict[int, Tensor] = field(default_factory=dict)
    made: dict[int, Tensor] = field(default_factory=dict)


class _Reading(TorchFunctionMode):
    """Collects what torch's functions are given, have not made, and may carry something of a transform."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.seen = _Seen(made={id(x): x for x in known})
        self.top = _functorch.maybe_current_level() or 0

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and id(x) not in self.seen.made and carries(x):
                    self.seen.read.setdefault(id(x), x)
        found = fn(*args, **kwargs or {})
        with torch._C.DisableTorchFunction():
            self.seen.made.update((id(x), x) for x in tree_leaves(found) if isinstance(x, Tensor))
        return found


def carries(x: Tensor) -> bool:
    """Whether x may carry derivatives or a vmapped dimension."""
    if is_wrapped(x) or x.requires_grad:
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _closed_over(problem: Problem, z: Tensor) -> list[Tensor]:
    """What fn reads besides its arguments and carries derivatives or a vmapped dimension.

    What it makes past torch's functions is another tensor in every evaluation; what it closes over is the same.
    """
    first = _evaluation(problem, z)
    if not first.read:
        return []
    second = _evaluation(problem, z)
    same = [x for key, x in first.read.items() if key in second.read]
    top = _functorch.maybe_current_level() or 0
    for x in first.read.values():
        inner = x
        while is_wrapped(inner) and _functorch.maybe_get_level(inner) > top:
            inner = _functorch.get_unwrapped(inner)
        outside = id(inner) not in first.made and id(inner) not in {id(y) for y in problem.inputs}
        if inner is not x and outside and carries(inner) and _is_kept(inner, second, top):
            raise NotImplementedError(HIDDEN)
    return same


def _is_kept(x: Tensor, seen: _Seen, top: int) -> bool:
    """Whether another evaluation has read x too, within a transform of its own."""
    for y in seen.read.values():
        while is_wrapped(y) and _functorch.maybe_get_level(y) > top:
            y = _functorch.get_unwrapped(y)
        if y is x:
            return True
    return False


def _evaluation(problem: Problem, z: Tensor) -> _Seen:
    with torch.no_grad(), _Reading([z, *problem.inputs]) as reading:
        problem(z, problem.inputs)
    return reading.seen


@dataclass(frozen=True)
class _Place:
    """Where a function finds something: a name that a module holds, or a variable that the function closes over."""

    held: Any  # a dictionary, or a cell
    name: str | None = None

    def read(self) -> Any:
        if self.name is not None:
            return self.held.get(self.name)
        try:
            return self.held.cell_contents
        except ValueError:  # not yet there
            return None

    def write(self, value: Any) -> None:
        if self.name is not None:
            self.held[self.name] = value
        else:
            self.held.cell_contents = value


def _places(fn: Any) -> list[_Place]:
    """Those that a function reaches: of its modules, of what it is bound to, closes over or reads of its globals."""
    found: list[_Place] = []
    seen: set[int] = set()
    front = [fn]
    for _ in range(REACH):
        front = [part for x in front if x is not None and id(x) not in seen for part in _parts(x, found, seen)]
    return found


def _parts(x: Any, found: list[_Place], seen: set[int]) -> list[Any]:
    """What is to be looked into of x; the places that it has itself go to `found`."""
    seen.add(id(x))
    if isinstance(x, nn.Module):
        held = [d for module in x.modules() for d in (module._parameters, module._buffers)]
        found.extend(_Place(d, name) for d in held for name in d)
    elif isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, (tuple, list)) and len(x) <= MANY:
        return list(x)
    elif isinstance(x, dict) and len(x) <= MANY:
        return list(x.values())
    elif (code := getattr(x, "__code__", None)) is not None:
        function = getattr(x, "__func__", x)
        cells = [_Place(cell) for cell in function.__closure__ or ()]
        found.extend(cells)
        read = [function.__globals__.get(name) for name in code.co_names]
        return [getattr(x, "__self__", None), *(cell.read() for cell in cells), *read, *(function.__defaults__ or ())]
    elif callable(x) and not isinstance(x, type) and hasattr(x, "__dict__"):
        return list(vars(x).values())
    return []
