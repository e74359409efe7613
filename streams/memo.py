"""What was worked out for one message and holds for others too: most messages of a topic have the same headers."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

_MOST = 4096
"""Keys that are remembered; all are forgotten when there are more. Chosen by hand, for topics of some thousand class
names, each of which makes headers of its own."""

_LARGEST = 512
"""Bytes of the largest key that is remembered: headers with a label, a type, and an identifier or two. With _MOST of
them a memo takes 10 MB at most, whatever producers send."""


class Memo(dict[Key, Value]):
    """A bounded dictionary of what a function gave for its argument: `get` looks, `keep` adds what was not there."""

    def keep(self, key: Key, value: Value, size: int) -> Value:
        """Remember `value` for `key`, which has `size` bytes, where it is small; gives `value` back."""
        if size <= _LARGEST:
            if len(self) >= _MOST:
                self.clear()
            self[key] = value
        return value
