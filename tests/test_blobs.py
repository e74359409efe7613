"""Blobs of sites in chunks: whatever order, loss or damage they come in, the newest complete one is what is kept."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from streams import blobs
from streams.blobs import HEADER, Blob, BlobRefused, Blobs, Chunk, cut, ended, kept


def blob(data: bytes, sequence: int, site: str = "b", size: int = 4, generation: int = 0) -> list[Chunk]:
    facts = Blob(site, sequence, sequence, hashlib.sha256(data).hexdigest(), len(data), size, generation)
    return list(cut(facts, data))


def anything(site: str, path: Path) -> None:
    """A check that takes everything."""


def opened(folder: Path, max_bytes: int = 1000, check=anything, max_sites: int = 5) -> Blobs:
    return Blobs(folder, "a", max_bytes, check, max_sites)


def deliver(store: Blobs, chunks: Iterable[Chunk]) -> list[str]:
    """What was refused."""
    refused = []
    for chunk in chunks:
        try:
            store.take(chunk.key, chunk.value, chunk.headers)
        except BlobRefused as error:
            refused.append(str(error))
    return refused


def contents(folder: Path) -> dict[str, bytes]:
    return {site: path.read_bytes() for site, (_, path) in kept(folder).items()}


OLD, NEW = b"0123456789", b"abcdefghij"


def test_a_blob_that_fits_a_chunk_and_one_that_fills_them_come_back(tmp_path):
    for sequence, data in enumerate((b"x", b"1234", b"12345", b"12345678"), start=1):
        store = opened(tmp_path)
        assert deliver(store, blob(data, sequence)) == []
        assert contents(tmp_path) == {"b": data}


def test_in_every_order_the_newest_complete_blob_is_kept(tmp_path):
    chunks = [*blob(OLD, 1), *blob(NEW, 2)]
    for order in itertools.permutations(range(6)):
        folder = tmp_path / str(order)
        assert deliver(opened(folder), [chunks[i] for i in order]) == []
        assert contents(folder) == {"b": NEW}
        assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("lost", range(3))
def test_a_blob_that_lacks_a_chunk_leaves_the_one_before(lost, tmp_path):
    for order in itertools.permutations(range(5)):
        store = opened(tmp_path / str(order))
        chunks = [*blob(OLD, 1), *(chunk for i, chunk in enumerate(blob(NEW, 2)) if i != lost)]
        deliver(store, [chunks[i] for i in order])
        assert contents(tmp_path / str(order)) == {"b": OLD}


def test_compaction_that_took_chunks_from_the_middle_of_older_blobs_is_recognised(tmp_path):
    # given the log after compaction: of the blobs before the newest only chunks that it has no more are left
    long, short = blob(b"0123456789abcdef", 1), blob(b"xy0123", 2)
    store = opened(tmp_path)
    assert deliver(store, [*long[2:], *short]) == []
    assert contents(tmp_path) == {"b": b"xy0123"}


class Compacted(dict):
    """What a compacted topic has: the newest chunk of each key."""

    def write(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self.pop(chunk.key, None)
            self[chunk.key] = chunk


@pytest.mark.parametrize("sent", range(3))
def test_who_reads_late_finds_the_blob_before_where_the_next_one_was_never_finished(sent, tmp_path):
    # given a publisher that takes both generations of keys in turn, and dies while it publishes the third blob, twice
    topic = Compacted()
    third = b"klmnopqrst"
    for chunks in (blob(OLD, 1), blob(NEW, 2, generation=1), blob(third, 3)[:sent], blob(OLD, 4)[:sent]):
        topic.write(chunks)
    # then who begins to read has the second, also where some of it comes twice, and never a mixture
    rng = random.Random(sent)
    for number in range(20):
        store = opened(tmp_path / str(number))
        again = rng.randrange(len(topic))
        assert deliver(store, [*topic.values()][:again]) == [] and deliver(store, topic.values()) == []
        assert contents(tmp_path / str(number)) == {"b": NEW}
        assert store.torn() == set() and store.settle() == set()
    # and once it is published the third, whoever reads
    topic.write(blob(third, 5))
    for folder in (tmp_path / "0", tmp_path / "late"):
        assert deliver(opened(folder), topic.values()) == [] and contents(folder) == {"b": third}


def test_a_first_blob_that_was_never_finished_is_told_and_not_used(tmp_path):
    store = opened(tmp_path)
    deliver(store, [*blob(OLD, 1)[:2], *blob(OLD, 1, "c")])
    assert store.torn() == {"b"} and contents(tmp_path) == {"c": OLD}
    deliver(store, blob(OLD, 1)[2:])
    assert store.torn() == set() and contents(tmp_path) == {"b": OLD, "c": OLD}


def test_the_own_sites_next_blob_takes_the_keys_that_its_newest_complete_one_has_not(tmp_path):
    for written, generation in (
        ([], 0),
        ([blob(OLD, 1, "a")], 1),
        ([blob(OLD, 1, "a")[:2]], 0),
        ([blob(OLD, 1, "a"), blob(NEW, 2, "a", generation=1)[:2]], 1),
        ([blob(OLD, 1, "a"), blob(NEW, 2, "a", generation=1)], 0),
        ([blob(OLD, 1, "a"), blob(NEW, 2, "a", generation=1), blob(OLD, 3, "a")[1:]], 0),
        ([blob(OLD, 1, "a"), blob(NEW, 2, "a", generation=1), blob(OLD, 3, "a")], 1),
        ([blob(OLD, 1, "a"), [ended("a", 0, 2)]], 0),
    ):
        topic = Compacted()
        for chunks in written:
            topic.write(chunks)
        store = opened(tmp_path)
        deliver(store, topic.values())
        assert store.next_generation() == generation, written
        store.begin_anew()
        assert store.next_generation() == 0 and store.own_chunks(0) == store.own_chunks(1) == []


def test_what_is_delivered_again_changes_nothing(tmp_path):
    rng = random.Random(5)
    chunks = [*blob(OLD, 1), *blob(NEW, 2)]
    for _ in range(50):
        folder = tmp_path / str(rng.random())
        store = opened(folder)
        deliver(store, rng.sample(chunks * 3, len(chunks) * 3))
        assert contents(folder) == {"b": NEW}
        changed = [store.take(chunk.key, chunk.value, chunk.headers) for chunk in chunks]
        assert changed == [False] * len(chunks)


def test_sites_do_not_disturb_each_other_and_the_own_one_is_only_noted(tmp_path):
    store = opened(tmp_path)
    mine, theirs, others = blob(b"m" * 20, 7, "a"), blob(OLD, 1, "b"), blob(NEW, 1, "c.d-1")
    for chunk in itertools.chain(*itertools.zip_longest(mine, theirs, others)):
        if chunk is not None:
            store.take(chunk.key, chunk.value, chunk.headers)
    assert contents(tmp_path) == {"b": OLD, "c.d-1": NEW}
    assert (store.own_sequence, store.own_chunks(0), store.own_chunks(1)) == (7, [4, 3, 2, 1, 0], [])
    deliver(store, [ended("a", 4, 8), ended("a", 3, 8)])
    assert store.own_chunks(0) == [2, 1, 0]


def test_a_chunk_of_the_own_site_that_somebody_made_up_costs_one_end_and_not_those_of_all_numbers_below(tmp_path):
    store, far = opened(tmp_path), blob(OLD, 1, "a")[0]
    said = json.loads(dict(far.headers)[HEADER]) | {"bytes": 2**52, "chunk_bytes": 1}
    far = replace(far, key=b"a/499999999", value=b"x", headers=((HEADER, json.dumps(said).encode()),))
    assert deliver(store, [far]) == [] and store.own_chunks(0) == [499_999_999]
    deliver(store, [ended("a", 499_999_999, 2)])
    assert store.own_chunks(0) == []
    # what its blob cannot have is refused as another site's is
    assert len(deliver(store, [replace(far, value=b"xx"), replace(blob(OLD, 1, "a")[0], key=b"a/9")])) == 2
    assert store.own_chunks(0) == []


def test_damage_is_refused_and_leaves_what_was_there(tmp_path):
    store = opened(tmp_path)
    deliver(store, blob(OLD, 1))
    first, second, third = blob(NEW, 2)
    [refused] = deliver(store, [first, replace(second, value=b"XXXX"), third])
    assert "sha256" in refused and contents(tmp_path) == {"b": OLD}
    # and it is done with: a whole copy of the same number, as a peer could send again and again, is not put together
    assert deliver(store, blob(NEW, 2)) == [] and contents(tmp_path) == {"b": OLD}
    assert deliver(store, blob(NEW, 3)) == [] and contents(tmp_path) == {"b": NEW}


def test_mixed_blobs_of_one_number_are_refused(tmp_path):
    store = opened(tmp_path)
    refused = deliver(store, [*blob(OLD, 1)[:2], blob(NEW, 1)[2]])
    assert len(refused) == 1 and "two blobs" in refused[0] and contents(tmp_path) == {}


def test_what_is_no_chunk_is_refused(tmp_path):
    store = opened(tmp_path)
    good = blob(OLD, 1)[0]
    said = json.loads(dict(good.headers)[HEADER])

    def changed(**other: object) -> Chunk:
        return replace(good, headers=((HEADER, json.dumps({**said, **other}).encode()),))

    bad = [
        replace(good, key=None), replace(good, key=b"b"), replace(good, key=b"../b/0"), replace(good, key=b"b/-1"),
        replace(good, key=b"b/99999999999"), replace(good, key=b"b/7"), replace(good, key=b"\xff/0"),
        replace(good, headers=()), replace(good, headers=((HEADER, b"{"),)), replace(good, headers=((HEADER, b"[1]"),)),
        replace(good, headers=((HEADER, b"[" * 4000),)), replace(good, value=b"too long for it"),
        replace(good, value=b""), changed(format=2), changed(sequence=-1), changed(sequence=1.5),
        changed(sequence=True), changed(sequence=2**60), changed(sequence=2**50), changed(bytes=0),
        changed(chunk_bytes=0), changed(sha256="x"), changed(sha256=None), changed(site="c"), changed(version="1"),
        changed(generation=2), changed(generation=True), changed(generation=1), replace(good, key=b"b/500000000"),
        changed(bytes=10**15, chunk_bytes=4),
    ]  # fmt: skip
    assert len(deliver(store, bad)) == len(bad)
    assert list(tmp_path.iterdir()) == []


def test_what_the_check_refuses_is_not_kept(tmp_path):
    def picky(site: str, path: Path) -> None:
        if b"bad" in path.read_bytes():
            raise BlobRefused(f"{site} is bad")

    store = opened(tmp_path, check=picky)
    assert deliver(store, [*blob(b"good state", 1), *blob(b"a bad state", 2)]) == ["b is bad"]
    assert contents(tmp_path) == {"b": b"good state"}


def test_bytes_and_sites_have_bounds_and_each_blob_beyond_is_refused_once(tmp_path):
    store = opened(tmp_path, max_bytes=30, max_sites=2)
    assert deliver(store, blob(OLD, 1, "b")) == []
    [refused] = deliver(store, blob(b"x" * 16, 1, "c"))
    assert "fleet.max_bytes" in refused
    assert deliver(store, blob(OLD, 2, "c")) == []
    [refused] = deliver(store, blob(b"y", 1, "d"))
    assert "at most 2" in refused
    assert contents(tmp_path) == {"b": OLD, "c": OLD}


def test_what_is_said_of_a_large_blob_takes_no_room_and_what_comes_of_it_does(tmp_path):
    # given a blob and beginnings of three that say they are half of all that there may be
    store = opened(tmp_path, max_bytes=30)
    assert deliver(store, [*blob(OLD, 1, "b"), *(blob(b"x" * 15, 1, site)[0] for site in "cde")]) == []
    # then there is still room for what comes as a whole
    assert deliver(store, blob(NEW, 2, "b")[:2]) == [] and contents(tmp_path) == {"b": OLD}
    # until what came takes all of it: 10 that are kept, 12 and 8
    [refused] = deliver(store, blob(NEW, 2, "b")[2:])
    assert "no room: 30 bytes are taken" in refused and contents(tmp_path) == {"b": OLD}
    assert deliver(store, blob(NEW, 3, "b")[:2]) == []


def test_a_blob_that_is_replaced_while_the_folder_is_read_is_not_missing(tmp_path, monkeypatch):
    store = opened(tmp_path)
    deliver(store, blob(OLD, 1))
    read = blobs.Path.read_text

    def replaced_meanwhile(path: Path, **keys: str) -> str:
        text = read(path, **keys)
        deliver(store, blob(NEW, 2))
        return text

    monkeypatch.setattr(blobs.Path, "read_text", replaced_meanwhile)
    assert contents(tmp_path) == {"b": NEW}


def test_a_restart_keeps_what_was_complete_and_sweeps_the_rest(tmp_path):
    store = opened(tmp_path)
    deliver(store, [*blob(OLD, 1), *blob(NEW, 2)[:2]])
    (tmp_path / "b.json.new").touch()
    again = opened(tmp_path)
    assert again.known().keys() == {"b"} and contents(tmp_path) == {"b": OLD}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-1.blob", "b.json"]
    # reading begins anew
    deliver(again, [*blob(OLD, 1), *blob(NEW, 2)])
    assert contents(tmp_path) == {"b": NEW}


def test_a_kill_between_any_two_steps_of_the_disk_leaves_a_complete_blob(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    for step in range(20):
        folder = tmp_path / str(step)
        store = opened(folder)
        deliver(store, blob(OLD, 1))
        left = iter(range(step))

        def stumble(original, left=left):
            def call(*arguments, **keywords):
                if next(left, None) is None:
                    raise Killed
                return original(*arguments, **keywords)

            return call

        with monkeypatch.context() as patched:
            for name in ("rename", "unlink", "open"):
                patched.setattr(blobs.Path, name, stumble(getattr(Path, name)))
            with contextlib.suppress(Killed):
                deliver(store, blob(NEW, 2))
        opened(folder)
        assert contents(folder)["b"] in (OLD, NEW)
    assert contents(folder) == {"b": NEW}  # the last ones were not killed any more


def test_a_forgotten_site_is_dropped_and_may_come_again(tmp_path):
    store = opened(tmp_path)
    deliver(store, [*blob(OLD, 1), *blob(OLD, 1, "c"), *blob(NEW, 2)[:1]])
    end = ended("b", 0, 2)
    assert store.take(end.key, end.value, end.headers) is True
    assert contents(tmp_path) == {"c": OLD}
    # what was published before is not taken up again, in whatever order it comes
    deliver(store, [*blob(OLD, 1), *blob(NEW, 2)])
    assert contents(tmp_path) == {"c": OLD}
    deliver(store, blob(NEW, 3))
    assert contents(tmp_path) == {"c": OLD, "b": NEW}
    assert store.take(end.key, end.value, end.headers) is False
    assert contents(tmp_path) == {"c": OLD, "b": NEW}


def test_the_end_of_a_chunk_that_a_shorter_blob_has_no_more_forgets_nobody(tmp_path):
    store = opened(tmp_path)
    deliver(store, [*blob(b"12", 2), ended("b", 1, 2)])
    assert contents(tmp_path) == {"b": b"12"}


def test_who_was_forgotten_while_nobody_listened_is_dropped_once_the_topic_is_read(tmp_path):
    store = opened(tmp_path)
    deliver(store, [*blob(OLD, 1), *blob(OLD, 1, "c")])
    again = opened(tmp_path)
    deliver(again, blob(OLD, 1))
    assert again.settle() == {"c"} and contents(tmp_path) == {"b": OLD}
    # a topic that has nothing of anybody was made anew
    assert opened(tmp_path).settle() == set() and contents(tmp_path) == {"b": OLD}


def test_a_damaged_entry_of_the_folder_is_left_out(tmp_path):
    deliver(opened(tmp_path), [*blob(OLD, 1), *blob(OLD, 1, "c"), *blob(OLD, 1, "d")])
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c-1.blob").write_bytes(b"short")
    assert opened(tmp_path).known().keys() == {"d"}
