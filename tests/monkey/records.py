"""Messages at, under and over every limit: each gives a sample, a mark or a rejection, and every offset counts.

`python -m tests.monkey.records --count 100000 --seed 7`. Messages come in batches of three partitions, as from a
broker, and go the agent's way: unpacked, decoded, images of claims fetched, merged by time, cut into tasks, committed.
"""

from __future__ import annotations

import http.client
import logging
import os
import posixpath
import random
import tempfile
import time
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from kafka.record.memory_records import MemoryRecords

from streams.buffer import CutRule, Task, TaskBuffer
from streams.claims import ImageStore
from streams.dead_letters import FileDeadLetters
from streams.formats import Claim, Codec
from streams.kafka.record_batches import Message as Read
from streams.kafka.record_batches import PartitionRecords, Unreadable, rejections
from streams.merge import Merge
from streams.record import (
    MAX_DETAIL_CHARS,
    Control,
    Item,
    Partition,
    Reason,
    Rejected,
    Unreachable,
    Unusable,
    canonical_label,
)
from streams.spool import Spool
from tests.monkey import grammar
from tests.monkey.grammar import GOOD, MAX_BYTES, MAX_LABEL, MAX_PIXELS, Message
from tests.monkey.runs import Failed, Run, peak_mb, reset_peak

PARTITIONS = [Partition("t", number) for number in range(3)]
BATCH = 20
SECONDS = 2.0
"""Of processor time that any message may take: a hundred times what the slowest takes on an idle machine."""
MEGABYTES = 64.0
"""Of memory that a batch may take; the largest has some 2 MB."""


class Store(ImageStore):
    """Answers instead of servers, with an image, nothing, an error or trouble; notes what leads out of its places."""

    chance: random.Random

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        grammar.PLACES.append(f"file://{folder}/")
        super().__init__(grammar.PLACES, MAX_BYTES, sleep=lambda seconds: None)

    def _get(self, parts: urllib.parse.SplitResult, url: str, most: int) -> bytes:
        if not any(below(url, place) for place in grammar.PLACES):
            raise AssertionError(f"{url!r} leads out of the allowed places")
        if url.endswith("/good"):
            return GOOD[0]
        how = self.chance.randrange(8)
        if how == 0:
            raise http.client.HTTPException("status 503")
        if how == 1:
            raise TimeoutError("no whole answer")
        if how == 2:
            raise Unusable(Reason.FETCH_FAILED, "answered 404")
        if how == 3:
            raise Unusable(Reason.TOO_LARGE, "more bytes")
        return GOOD[0]

    def _read(self, parts: urllib.parse.SplitResult) -> bytes:
        path = Path(urllib.parse.unquote(parts.path))
        found = super()._read(parts)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise AssertionError(f"{parts.geturl()!r} was read from outside")
        return found


def below(url: str, place: str) -> bool:
    """Whether `url` leads below `place`, for a server that decodes it often, drops `;...` and takes `\\` for `/`."""
    if not url.startswith(place):
        return False
    path, root = urllib.parse.urlsplit(url).path, urllib.parse.urlsplit(place).path
    for _ in range(9):
        steps = [step.partition(";")[0].strip() for step in path.replace("\\", "/").split("/")]
        if not f"{posixpath.normpath('/'.join(steps))}/".startswith(root):
            return False
        path = urllib.parse.unquote(path)
    return True


def place(folder: Path) -> Path:
    """A folder of images as an allowed place has it, with what may lead out of it."""
    inside = folder / "images"
    (inside / "folder").mkdir(parents=True)
    (folder / "secret").write_bytes(GOOD[0])
    (inside / "link").symlink_to(folder / "secret")
    os.mkfifo(inside / "pipe")
    (inside / "good").write_bytes(GOOD[0])
    (inside / "a").write_bytes(bytes(MAX_BYTES + 1))
    return inside


class Stream:
    """The way of messages from a fetch to the commits, and what is counted on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = place(folder)
        self.store = Store(self.folder)
        self.codec = Codec(max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, max_label_chars=MAX_LABEL)
        self.merge: Merge[Item] = Merge(2.0)
        self.merge.track(PARTITIONS)
        self.spool = Spool(folder / "spool", 2**26, 2**20)
        self.buffer = TaskBuffer(CutRule(samples=500), self.spool, (), 1, dict.fromkeys(PARTITIONS, 0))
        self.letters = FileDeadLetters(folder / "letters", 2**20)
        self.offsets = dict.fromkeys(PARTITIONS, 0)
        self.came_out = dict.fromkeys(PARTITIONS, 0)
        self.now_ms = 1_795_000_000_000
        self.counted: Counter[str] = Counter()
        self.in_tasks = 0
        self.slowest = (0.0, "")
        self.largest_mb = 0.0

    def feed(self, chance: random.Random) -> int:
        """One batch of one partition through all of it; how many messages it had."""
        partition = chance.choice(PARTITIONS)
        base = self.offsets[partition]
        messages = [grammar.message(chance, self.now_ms) for _ in range(chance.randint(1, 2 * BATCH))]
        spoiled = chance.random() < 0.03
        codec = chance.choice((0, 0, 0, 1, 2, 3, 4))
        data = bytearray(
            grammar.batch(
                messages, base, codec, (lambda records: grammar.mutated(records, chance)) if spoiled else bytes
            )
        )
        if not spoiled and chance.random() < 0.02:  # a disk's doing, which the checksum tells
            data[chance.randrange(61, len(data))] ^= 1 << chance.randrange(8)
            spoiled = True
        reset_peak()
        before = peak_mb()
        items = self.read(partition, bytes(data), chance, [] if spoiled else messages)
        self.largest_mb = max(self.largest_mb, peak_mb() - before)
        if peak_mb() - before > MEGABYTES:
            raise Failed(f"a batch of {len(data)} bytes took {peak_mb() - before:.0f} MB")
        if [item.offset for item in items] != list(range(base, base + len(messages))):
            if not spoiled:
                raise Failed(f"offsets {base} to {base + len(messages)} became {[item.offset for item in items]}")
            items = [
                item for item in items if base <= item.offset < base + len(messages)
            ]  # a broker refuses such a batch
            got = {item.offset: item for item in items}
            items = [
                got.get(o, Rejected(partition, o, Reason.UNDECODABLE, "")) for o in range(base, base + len(messages))
            ]
        self.offsets[partition] = base + len(messages)
        stamps = [one.timestamp_ms for one in messages]
        self.merge.add(partition, zip(stamps, items, strict=True), self.now_ms)
        self.pass_on(chance.randrange(500))
        return len(messages)

    def read(self, partition: Partition, data: bytes, chance: random.Random, messages: Sequence[Message]) -> list[Item]:
        """What a fetch of one batch becomes; `messages` is what was sent, empty where that means nothing any more."""
        found = PartitionRecords(self.offsets[partition], TopicPartition(*partition), MemoryRecords(data))
        items: list[Item] = []
        self.store.chance = chance
        for index, read in enumerate(found.take()):
            if isinstance(read, Unreadable):
                if messages:
                    raise Failed(f"a good batch cannot be read: {read.error!r}")
                if read.next_offset - read.offset > 10 * BATCH:
                    raise Failed(f"a batch of at most {2 * BATCH} messages is said to end at {read.next_offset}")
                items += rejections(partition, read)
                continue
            began = time.thread_time()
            item = self.item(partition, read)
            took = time.thread_time() - began
            kind = item.reason if isinstance(item, Rejected) else type(item).__name__.lower()
            if took > self.slowest[0]:
                self.slowest = took, f"{kind} of {len(read.raw.value or b'')} bytes"
            if took > SECONDS:
                raise Failed(f"a {kind} took {took:.1f} s: {str(read)[:300]}")
            self.counted[kind] += 1
            self.judge(item, messages[index] if messages else None, read)
            items.append(item)
        if found:
            raise Failed("a batch was not read to its end")
        return items

    def item(self, partition: Partition, read: Read) -> Item:
        item = self.codec.decode(partition, read.offset, read.raw, read.timestamp_ms / 1000)
        while isinstance(item, Claim):
            try:
                item = self.codec.fetch(item, self.store.fetch)
            except Unreachable:  # the agent waits and asks again
                self.counted["asked again"] += 1
        return item

    def judge(self, item: Item, sent: Message | None, read: Read) -> None:
        """Raise Failed for what is none of sample, mark and rejection, or not what the message had to become."""
        expected: Any = sent.expected if sent else "any"
        if isinstance(item, Rejected):
            ok = item.reason in Reason and len(item.detail) <= MAX_DETAIL_CHARS and expected in ("any", item.reason)
            if "AssertionError" in item.detail:
                raise Failed(item.detail)
        elif isinstance(item, Control):
            ok = expected in ("any", "mark")
        else:
            ok = expected in ("any", None) and canonical_label(item.label, MAX_LABEL) == item.label
            ok = ok and 0 < len(item.image) <= MAX_BYTES
        if not ok:
            raise Failed(
                f"became {str(item)[:400]}, expected {expected or 'a sample'}: {str(sent)[:400]} ... {str(sent)[-400:]}"
            )

    def pass_on(self, elapsed_ms: int) -> None:
        """Let time pass; what the merge gives goes into tasks, and tasks are committed at once."""
        self.now_ms += elapsed_ms
        for partition in PARTITIONS:
            self.merge.quiet(partition, self.now_ms)
        for item in self.merge.take(elapsed_ms / 1000):
            if item.offset != self.came_out[item.partition]:
                raise Failed(f"{item.partition} gave {item.offset} after {self.came_out[item.partition] - 1}")
            self.came_out[item.partition] += 1
            self.buffer.add(item)
            if isinstance(item, Rejected):
                self.letters.put(item)
        while (task := self.buffer.cut(0)) is not None:
            self.commit(task)

    def commit(self, task: Task) -> None:
        self.in_tasks += task.records
        for sample in task.samples[:3]:
            sample.read()
            self.spool.raw(sample)
        self.letters.flush()
        self.buffer.committed(task)
        self.letters.committed(task.next_offsets)

    def end(self) -> None:
        """All that was sent must have come out, in a task or after the last one."""
        self.pass_on(20_000)
        while (task := self.buffer.end("end")) is not None:
            self.commit(task)
        if self.came_out != self.offsets or self.buffer.next_offsets != self.offsets:
            raise Failed(
                f"{self.offsets} were sent, {self.came_out} came out, {self.buffer.next_offsets} are committed"
            )
        if self.in_tasks + self.buffer._records != sum(self.offsets.values()):
            raise Failed(f"{sum(self.offsets.values())} were sent, {self.in_tasks} are in tasks")
        self.letters.close()


def main(run: Run) -> None:
    logging.disable()
    warnings.simplefilter("ignore")  # Pillow's, of odd headers
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(Path(folder))
        done, number = 0, run.first
        while done < run.count:
            with run.case(number) as chance:
                done += stream.feed(chance)
            number += 1
            run.done(done)
        with run.case(number):
            stream.end()
    seconds, what = stream.slowest
    run.figures(
        records=done, batches=number - run.first, slowest=f"{seconds * 1000:.0f} ms ({what})",
        most_memory_of_a_batch=f"{stream.largest_mb:.0f} MB", dated_ahead=stream.merge.clamped.total(),
        **dict(stream.counted.most_common()),
    )  # fmt: skip


if __name__ == "__main__":
    Run("records", 100_000).watched(main)
