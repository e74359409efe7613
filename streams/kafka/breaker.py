"""Stops reading when nearly everything is rejected."""

from __future__ import annotations

from collections import deque


class Breaker:
    """Opens when nearly everything is rejected, lest a wrong setting empty a topic into its dead letters."""

    def __init__(self, share: float = 0.9, window: int = 1000, pause_s: float = 60) -> None:
        """Opens for `pause_s` when of the last `window` records more than `share` were rejected; 1.0: never."""
        self.share = share
        self.pause_s = pause_s
        self.window = window
        self._seen: deque[tuple[int, int]] = deque()
        self._records = self._rejected = 0

    def saw(self, records: int, rejected: int) -> bool:
        """True when it opens; what was seen until then is forgotten."""
        self._seen.append((records, rejected))
        self._records += records
        self._rejected += rejected
        while self._records - self._seen[0][0] >= self.window:
            old_records, old_rejected = self._seen.popleft()
            self._records -= old_records
            self._rejected -= old_rejected
        if self._records < self.window or self._rejected <= self.share * self._records:
            return False
        self._seen.clear()
        self._records = self._rejected = 0
        return True
