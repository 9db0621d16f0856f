"""Between the user's nested state and the solver's flat one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory import check_dense, is_plain, is_whole

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = {torch.complex128: torch.float64, torch.complex64: torch.float32}  # of two reals each
_NOTHING = torch.empty(0, device="cpu")  # stands for a tensor in a structure


def leaves_of(tree: Any, name: str) -> list[Tensor]:
    """The tensors of a nested tuple, list or dict, in order; TypeError names what else was found."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves_of(tree[key], f"{name}[{key!r}]")]
    if isinstance(tree, (tuple, list)):
        return [leaf for i, part in enumerate(tree) for leaf in leaves_of(part, f"{name}[{i}]")]
    raise TypeError(f"{name} must be a tensor or a nested tuple, list or dict of tensors, got {type(tree).__name__}")


def leaves_like(template: Any, tree: Any, name: str) -> list[Tensor]:
    """The tensors of `tree` in the order of `template`; ValueError or TypeError when the structures differ."""
    if isinstance(template, Tensor):
        if not isinstance(tree, Tensor):
            raise TypeError(f"{name} must be a tensor like z0, got {type(tree).__name__}")
        return [tree]
    if isinstance(template, dict):
        if not isinstance(tree, dict) or tree.keys() != template.keys():
            got = sorted(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(f"{name} must be a dict with the keys {sorted(map(str, template))} like z0, got {got}")
        return [leaf for key in template for leaf in leaves_like(template[key], tree[key], f"{name}[{key!r}]")]
    if not isinstance(tree, (tuple, list)) or len(tree) != len(template):
        got = f"{len(tree)} parts" if isinstance(tree, (tuple, list)) else type(tree).__name__
        raise ValueError(f"{name} must have {len(template)} parts like z0, got {got}")
    pairs = enumerate(zip(template, tree, strict=True))
    return [leaf for i, (part, own) in pairs for leaf in leaves_like(part, own, f"{name}[{i}]")]


def rebuild(tree: Any, leaves: Callable[[], Tensor]) -> Any:
    """A copy of the structure of `tree` whose tensors are drawn in order from `leaves`; None stays."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return leaves()
    if type(tree) is dict:
        return {key: rebuild(part, leaves) for key, part in tree.items()}
    if isinstance(tree, dict):
        other = copy.copy(tree)  # keeps what a subclass needs besides its items, as defaultdict does
        for key, part in tree.items():
            other[key] = rebuild(part, leaves)
        return other
    parts = [rebuild(part, leaves) for part in tree]
    if hasattr(tree, "_fields"):
        return type(tree)(*parts)
    return type(tree)(parts)


def named_leaves(tree: Any, name: str) -> list[tuple[str, Tensor]]:
    """The tensors of a nest of tuples, lists and dicts, in order, with their names; None holds none."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in named_leaves(tree[key], f"{name}[{key!r}]")]
    if isinstance(tree, (tuple, list)):
        return [leaf for i, part in enumerate(tree) for leaf in named_leaves(part, f"{name}[{i}]")]
    if not isinstance(tree, Tensor):
        raise TypeError(f"{name} must be a tensor, None, or a nested tuple, list or dict, got {type(tree).__name__}")
    return [(name, tree)]


def nested(fn: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """fn as a function of the state and of the tensors of `inputs` one by one, in the order of `named_leaves`."""
    skeleton = rebuild(inputs, lambda: torch.empty(0))

    def called(z: Any, *leaves: Tensor, **keywords: Any) -> Any:
        left = iter(leaves)
        return fn(z, *rebuild(skeleton, lambda: next(left)), **keywords)

    return called


def detached(tree: Any) -> Any:
    """`tree` with its tensors detached."""
    leaves = iter([leaf.detach() for leaf in leaves_of(tree, "z")])
    return rebuild(tree, lambda: next(leaves))


def copied(tree: Any) -> Any:
    """`tree` with its tensors detached, each in memory of its own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    leaves = iter([leaf.detach().clone() for leaf in leaves_of(tree, "z")])
    return rebuild(tree, lambda: next(leaves))


@dataclass(frozen=True, eq=False)
class Layout:
    """How a state of B samples lies in one tensor (B, T, D): T blocks (1 unless the solver couples blocks).

    A complex number lies there as its real and imaginary parts, one after the other.
    """

    template: Any  # the structure of z0 without its data, which so is not kept alive
    shapes: tuple[torch.Size, ...]  # of the leaves, without the batch dimension
    dtype: torch.dtype  # of the reals
    device: torch.device
    blocks: int  # T
    is_complex: bool = False

    @staticmethod
    def of(z0: Any, by_blocks: bool) -> Layout:
        """The layout of z0; by_blocks takes dimension 1 of every leaf as the blocks. Raises for unusable states."""
        leaves = leaves_of(z0, "z0")
        if not leaves:
            raise ValueError("z0 must hold at least one tensor")
        first = leaves[0]
        for leaf in leaves:
            check_dense("z0", leaf)
            _check_leaf(leaf.shape, leaf.dtype, by_blocks)
            if leaf is first:
                continue
            if leaf.shape[: 1 + by_blocks] != first.shape[: 1 + by_blocks]:
                raise ValueError(
                    f"the tensors of z0 must share their leading dimensions, got {tuple(first.shape)} "
                    f"and {tuple(leaf.shape)}"
                )
            if leaf.dtype != first.dtype or leaf.device != first.device:
                raise ValueError(
                    f"the tensors of z0 must share dtype and device, got {first.dtype} on {first.device} "
                    f"and {leaf.dtype} on {leaf.device}"
                )
        template = _NOTHING if first is z0 else rebuild(z0, lambda: _NOTHING)
        return _made(template, [leaf.shape for leaf in leaves], first.dtype, first.device, by_blocks)

    @staticmethod
    def begin(z0: Any, by_blocks: bool) -> tuple[Layout, Tensor]:
        """The layout of z0, and z0 packed."""
        if type(z0) is Tensor and not torch.compiler.is_compiling() and is_whole(z0):
            layout = _of_one(z0.shape, z0.dtype, z0.device, by_blocks)
            if not layout.is_complex:
                return layout, z0.view(z0.shape[0], layout.blocks, -1)
        layout = Layout.of(z0, by_blocks)
        return layout, layout.pack(z0, "z0")

    @property
    def is_view(self) -> bool:
        """A state is one tensor with the entries of the flat one, in their order."""
        return isinstance(self.template, Tensor) and not self.is_complex

    def pack(self, tree: Any, name: str) -> Tensor:
        """Structure → (n, T, D), contiguous, not negated lazily, in this layout's dtype.

        Raises where a tensor is not dense, complex where z0 is real, or not of the layout's shapes and device.
        """
        of_one = self.template is _NOTHING and not self.is_complex
        if of_one and type(tree) is Tensor and tree.dtype == self.dtype and is_plain(tree):
            shape = tree.shape
            if shape and shape[0] and shape[1:] == self.shapes[0] and tree.device == self.device:
                return tree.reshape(shape[0], self.blocks, -1)  # a view, but of what stands for others in a vmap
        leaves = leaves_like(self.template, tree, name)
        for leaf in leaves:
            check_dense(name, leaf)
        n = leaves[0].shape[0] if leaves[0].dim() else 0
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if leaf.dim() == 0 or leaf.shape[0] != n or leaf.shape[1:] != shape:
                raise ValueError(f"{name} must have shape {(n, *shape)} like z0, got {tuple(leaf.shape)}")
            if leaf.device != self.device:
                raise ValueError(f"{name} must be on {self.device} like z0, got {leaf.device}")
            if leaf.is_complex() and not self.is_complex:
                raise TypeError(f"{name} must be real like z0, got {leaf.dtype}")
        flat = [
            self._reals(leaf).reshape(n, self.blocks, -1 if n and leaf.numel() else self._features(shape))
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]
        packed = flat[0] if len(flat) == 1 else torch.cat(flat, dim=2)
        return packed.to(self.dtype).contiguous()

    def is_like(self, value: Any, state: Any) -> bool:
        """Whether a value is a plain tensor in memory of its own, with the entries of `pack`, and like `state`, one."""
        return (
            type(value) is Tensor and self.template is _NOTHING and value.dtype is self.dtype and not self.is_complex
            and is_whole(value) and value.shape == state.shape and value.device == self.device
        )  # fmt: skip

    def unpack(self, flat: Tensor) -> Any:
        """(n, T, D) → structure; views of `flat`."""
        n = flat.shape[0]
        if isinstance(self.template, Tensor) and not self.is_complex:
            return flat.view(n, *self.shapes[0])
        if len(self.shapes) == 1:
            parts = [flat]
        else:
            parts = list(flat.split([self._features(shape) for shape in self.shapes], dim=2))
        if self.is_complex:
            pairs = [part.reshape(n, *shape, 2) for part, shape in zip(parts, self.shapes, strict=True)]
            tensors = iter([torch.view_as_complex(pair) for pair in pairs])
        else:
            tensors = iter([part.reshape(n, *shape) for part, shape in zip(parts, self.shapes, strict=True)])
        return rebuild(self.template, lambda: next(tensors))

    def stand_in(self, flat: Tensor, good: Tensor) -> Tensor:
        """Of states (B, T, D), what may stand in the place of those that are not good (B,): the first that is."""
        return flat.index_select(0, good.to(torch.uint8).argmax(0, keepdim=True))

    def _reals(self, leaf: Tensor) -> Tensor:
        """leaf (n, …), or its real and imaginary parts (n, …, 2), with nothing left to be negated when read."""
        if not self.is_complex:
            return leaf.resolve_neg()
        return torch.view_as_real(leaf.to(torch.promote_types(leaf.dtype, torch.complex64)).resolve_conj())

    def _features(self, shape: torch.Size) -> int:
        return shape.numel() * (2 if self.is_complex else 1) // self.blocks if self.blocks else 0


def _check_leaf(shape: torch.Size, dtype: torch.dtype, by_blocks: bool) -> None:
    if dtype not in FLOATING and dtype not in COMPLEX:
        raise TypeError(f"z0 must be float64, float32, bfloat16, float16, complex128 or complex64, got {dtype}")
    if len(shape) < 1 + by_blocks:
        need = "(B, T, …)" if by_blocks else "(B, …)"
        raise ValueError(f"every tensor of z0 must have shape {need}, got {tuple(shape)}")


def _made(
    template: Any, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device, by_blocks: bool
) -> Layout:
    blocks = shapes[0][1] if by_blocks else 1
    parts = tuple([shape[1:] for shape in shapes])
    return Layout(template, parts, COMPLEX.get(dtype, dtype), device, blocks, dtype in COMPLEX)


@functools.lru_cache(maxsize=64)
def _of_one(shape: torch.Size, dtype: torch.dtype, device: torch.device, by_blocks: bool) -> Layout:
    """`Layout.of` a tensor, which is the same for all of its kind."""
    _check_leaf(shape, dtype, by_blocks)
    return _made(_NOTHING, [shape], dtype, device, by_blocks)
