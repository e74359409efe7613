"""Tells whether tensors are what they were, so that what was computed from them need not be computed again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Unchanged:
    """It remembers the tensors that it was last shown.

    They are kept, not copied: only for tensors that are never written once they are made, as those of a module that is
    released or of a frozen tower.
    """

    def __init__(self) -> None:
        self._last: Mapping[str, Tensor] | None = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether these have the names and the values of those shown before; False the first time."""
        last, self._last = self._last, dict(tensors)
        if last is None or last.keys() != tensors.keys():
            return False
        return all(_equal(tensor, tensors[name]) for name, tensor in last.items())


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare the bytes only where the two are not the same memory: most of a tower is shared by all its copies."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.data_ptr() == other.data_ptr() or one.equal(other)
