"""The contract of a source: positions are values, polling never blocks longer than asked, bad input is a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from streams.record import Item, Offsets, Partition, Rejected


class Source(Protocol):
    """It brings items in order within each partition. Used from one thread."""

    @property
    def exhausted(self) -> bool:
        """True once nothing will ever follow (an archive's end); a topic never is."""

    @property
    def live(self) -> bool:
        """True for a stream that goes on without us: where it begins depends on the moment it is asked, and what was
        there may be gone. Then the first commit is due before the first item is taken."""

    @property
    def fingerprint(self) -> str:
        """Identity of the order of items; a commit's offsets mean something only under the same fingerprint."""

    def continues(self, fingerprint: str) -> bool:
        """Tell whether the offsets of a commit under `fingerprint` mean something here. It is asked before `seek`."""

    def seek(self, offsets: Offsets, epochs: Mapping[Partition, int] | None = None) -> None:
        """Continue at a commit's `offsets`, with its `epochs`. Partitions that it lacks start where the configuration
        says.
        """

    @property
    def positions(self) -> Offsets:
        """Where `seek` began, for every partition there was, and what else the next commit has to remember."""

    def poll(self, timeout_s: float) -> Sequence[Item]:
        """Give the items that arrived, perhaps none, within about `timeout_s` seconds. It is called also while
        throttled.
        """

    def throttle(self, full: bool) -> None:
        """Fetch nothing new while `full`; polling goes on."""

    def vouches(self, timeout_s: float) -> bool:
        """Tell whether the offsets of all that was handed out still mean what they meant when it was read.

        It is asked before every commit. False when that could not be found out within `timeout_s` seconds, and the
        commit has to wait.

        Raises PositionError when they mean something else, so that nothing of it may be committed.
        """

    def past_marks(self, offsets: Offsets) -> Offsets:
        """Give the offsets to commit for `offsets`: the same place, behind what lies there in the stream but is no
        item.
        """

    def epochs(self, offsets: Offsets) -> Mapping[Partition, int]:
        """Give, for a commit of `offsets`, which history of the stream was read up to each: a number that rises when
        another place takes over the writing, for as much of the stream as has one."""

    def acknowledge(self, offsets: Offsets) -> None:
        """Tell the outside (lag tools) what is committed. It is never read back; a failure is logged, not fatal."""

    def judged(self, samples: int, rejected: int) -> None:
        """Tell the source that decoding `samples` of its records found `rejected` of them that cannot be used."""

    def lag(self) -> dict[tuple[str, int], int]:
        """Give the number of records not yet read, per (topic, partition); empty where it is unknown."""

    @property
    def retention_s(self) -> float:
        """Seconds for which the stream keeps its records at least; infinite where that is for ever, or is not known.

        What is read and not committed by then would be lost with this process.
        """

    @property
    def skipped(self) -> Mapping[str, int]:
        """The number of records by topic that were gone before they were read, since the process began."""

    @property
    def clamped(self) -> Mapping[str, int]:
        """The number of records by topic that were dated far after their arrival, since the process began."""

    @property
    def holding(self) -> str:
        """Why the source itself does not read at present; empty when it does."""

    def close(self) -> None:
        """Stop reading; what was handed out stays valid."""


class DeadLetters(Protocol):
    """Rejected records go here, as dead letters."""

    def put(self, rejected: Rejected) -> None:
        """Set a record aside, perhaps only later. Raises DeadLetterError."""

    def flush(self, timeout_s: float) -> None:
        """Return when everything put before is acknowledged.

        Raises DeadLetterError when it cannot be delivered: the commit that would pass those records must not happen.
        """

    def committed(self, offsets: Offsets) -> None:
        """Note that a commit has passed the records before `offsets`: their letters count as history from now on."""

    @property
    def removed(self) -> int:
        """The number of letters that a bound removed, since the process began."""

    def close(self) -> None:
        """Let go of files and connections. Letters that no `flush` followed may be lost."""


class StreamError(Exception):
    """The stream cannot go on. Subclasses and messages say what was got, what was expected, what happens next.

    StreamError
    ├── ArchiveError
    ├── PositionError       (another archive, order or topic; retention)
    ├── SpoolError          (the disk is full or read-only)
    ├── NotThere
    │   └── TopicMissing    (streams.kafka.exchange)
    └── DeadLetterError
        └── DeadLetterDelayed
    """


class NotThere(StreamError):
    """The cluster or a topic cannot be found; it may be on its way, so that a later attempt finds it."""


class ArchiveError(StreamError):
    """The archive is unreadable, empty or unsafe, or its class order does not fit."""


class PositionError(StreamError):
    """A commit's offsets do not fit this stream; reading on from anywhere else is for somebody to decide."""


class SpoolError(StreamError):
    """The disk does not take samples, or does not give them back."""


class DeadLetterError(StreamError):
    """A rejected record could not be set aside; the commit that passes it must not happen."""


class DeadLetterDelayed(DeadLetterError):
    """What holds the dead letters up may pass: `flush` may be called again."""
