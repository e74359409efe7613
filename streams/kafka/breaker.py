"""A breaker of reading, which opens when nearly everything is rejected.

Without it a wrong setting would empty a whole topic into its dead letters.
"""

from __future__ import annotations

from collections import deque


class Breaker:
    """Counts the last records, and how many of them were rejected."""

    def __init__(self, share: float = 0.9, window: int = 1000, pause_s: float = 60) -> None:
        """It opens when more than `share` of the last `window` records were rejected, and never with a share of 1.0.

        `pause_s` is not used here: the source reads nothing for this number of seconds when the breaker opens.
        """
        self.share = share
        self.pause_s = pause_s
        self.window = window
        self._seen: deque[tuple[int, int]] = deque()
        self._records = self._rejected = 0

    def saw(self, records: int, rejected: int) -> bool:
        """Count `records`, of which `rejected` were rejected. True when the breaker opens; all is forgotten then."""
        self._seen.append((records, rejected))
        self._records += records
        self._rejected += rejected
        # Whole calls leave the window, not single records: it is a little longer than asked for.
        while self._records - self._seen[0][0] >= self.window:
            old_records, old_rejected = self._seen.popleft()
            self._records -= old_records
            self._rejected -= old_rejected
        if self._records < self.window or self._rejected <= self.share * self._records:
            return False
        # Otherwise it would open again with the next record, after a pause that may have mended everything.
        self._seen.clear()
        self._records = self._rejected = 0
        return True
