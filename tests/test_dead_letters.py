"""Rejected records end up in bounded files that say what came, from where and why."""

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest

from streams.dead_letters import FileDeadLetters
from streams.record import Partition, Raw, Reason, Rejected
from streams.source import DeadLetterError


def rejected(offset: int = 0, raw: Raw | None = None) -> Rejected:
    return Rejected(Partition("images", 0), offset, Reason.TRUNCATED, "cat/1.jpg: ends early", raw)


def letters(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_a_letter_repeats_the_message_and_says_why(tmp_path):
    dead = FileDeadLetters(tmp_path / "dead", max_bytes=2**20)
    dead.put(rejected(7, Raw(b"key", b"\xff\xd8half", (("label", b"cat"), ("gone", None)))))
    dead.put(rejected(8))
    dead.flush(timeout_s=1)

    first, second = letters(tmp_path / "dead")
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "topic": "images",
        "partition": 0,
        "offset": 7,
        "reason": "truncated",
        "detail": "cat/1.jpg: ends early",
        "key": base64.b64encode(b"key").decode(),
        "value": base64.b64encode(b"\xff\xd8half").decode(),
        "headers": [["label", base64.b64encode(b"cat").decode()], ["gone", None]],
    }
    assert second["offset"] == 8 and "value" not in second


def test_a_value_beyond_the_bound_is_described(tmp_path):
    value = os.urandom(100_000)
    dead = FileDeadLetters(tmp_path, max_bytes=100_000)
    dead.put(rejected(raw=Raw(None, value)))
    dead.flush(timeout_s=1)
    (letter,) = letters(tmp_path)
    assert "value" not in letter
    assert (letter["value_bytes"], letter["value_sha256"]) == (100_000, hashlib.sha256(value).hexdigest())


def test_the_newest_letters_stay_within_the_bound(tmp_path):
    dead = FileDeadLetters(tmp_path, max_bytes=80_000)
    for offset in range(1000):
        dead.put(rejected(offset, Raw(None, bytes(300))))
        dead.committed({Partition("images", 0): offset + 1})
    dead.flush(timeout_s=1)
    kept = [letter["offset"] for letter in letters(tmp_path)]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 80_000
    assert kept == list(range(kept[0], 1000)) and len(kept) > 80


def test_a_line_cut_by_a_crash_spoils_no_other(tmp_path):
    # given letters of a run that died within a line
    before = FileDeadLetters(tmp_path, max_bytes=2**20)
    before.put(rejected(1))
    before.flush(timeout_s=1)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-20])

    # when the next run sets the record aside again
    after = FileDeadLetters(tmp_path, max_bytes=2**20)
    after.put(rejected(1))
    after.flush(timeout_s=1)
    after.close()

    # then its letter is whole
    assert json.loads(max(tmp_path.iterdir()).read_text())["offset"] == 1


def test_nothing_rejected_makes_no_folder(tmp_path):
    dead = FileDeadLetters(tmp_path / "dead", max_bytes=2**20)
    dead.flush(timeout_s=1)
    dead.close()
    assert not (tmp_path / "dead").exists()


def test_a_disk_that_takes_no_more_fails_every_flush_from_then_on(tmp_path):
    dead = FileDeadLetters(tmp_path, max_bytes=2**20)
    dead.put(rejected(1))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, dead._file.fileno())
    os.close(full)
    for _ in range(2):
        with pytest.raises(DeadLetterError, match=r"No space left on device; make room .* Nothing is lost"):
            dead.flush(timeout_s=1)
    dead.close()


def test_a_folder_that_cannot_be_made_fails_the_flush(tmp_path):
    (tmp_path / "file").write_text("in the way")
    dead = FileDeadLetters(tmp_path / "file" / "dead", max_bytes=2**20)
    dead.put(rejected())
    with pytest.raises(DeadLetterError, match="Not a directory"):
        dead.flush(timeout_s=1)


def test_starts_that_reject_a_little_cost_no_letter(tmp_path):
    # given more starts than files share the bound, each of which sets one record aside
    for offset in range(12):
        dead = FileDeadLetters(tmp_path, max_bytes=2**20)
        dead.put(rejected(offset, Raw(None, b"x")))
        dead.flush(timeout_s=1)
        dead.close()

    # then all are there, and they do not fill the folder with files of a line each
    assert [letter["offset"] for letter in letters(tmp_path)] == list(range(12))
    assert len(list(tmp_path.iterdir())) == 1 and dead.removed == 0


def test_files_that_a_crash_cut_short_are_bound_by_their_bytes_too(tmp_path):
    # given runs that each died within a line, so that no file is continued
    for offset in range(12):
        dead = FileDeadLetters(tmp_path, max_bytes=2**20)
        dead.put(rejected(offset))
        dead.close()
        last = max(tmp_path.iterdir())
        with last.open("ab") as file:
            file.write(b'{"time"')
    assert len(list(tmp_path.iterdir())) == 12 and dead.removed == 0


def test_the_bound_removes_only_letters_that_a_commit_has_passed_and_counts_them(tmp_path, caplog):
    # given far more letters than the bound has room for, before any commit
    dead = FileDeadLetters(tmp_path, max_bytes=80_000)
    for offset in range(400):
        dead.put(rejected(offset, Raw(None, bytes(300))))
    dead.flush(timeout_s=1)
    assert [letter["offset"] for letter in letters(tmp_path)] == list(range(400)) and dead.removed == 0

    # when a commit passes some of them
    dead.committed({Partition("images", 0): 100})

    # then none of the others goes, and what went is counted and logged
    kept = [letter["offset"] for letter in letters(tmp_path)]
    assert kept == list(range(kept[0], 400)) and 0 < kept[0] <= 100
    assert dead.removed == kept[0] and f"deleted the oldest {kept[0]} of them (00000001.jsonl" in caplog.text

    # and once all are passed, the folder is within its bound again
    dead.committed({Partition("images", 0): 400})
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 80_000
    dead.put(rejected(400))
    dead.flush(timeout_s=1)
    kept = [letter["offset"] for letter in letters(tmp_path)]
    assert kept == list(range(kept[0], 401)) and dead.removed == kept[0]


def test_a_letter_of_another_partition_is_kept_until_that_one_is_committed(tmp_path):
    dead = FileDeadLetters(tmp_path, max_bytes=8000)
    dead.put(Rejected(Partition("images", 1), 0, Reason.EMPTY, "first"))
    for offset in range(200):
        dead.put(rejected(offset))
    dead.flush(timeout_s=1)
    dead.committed({Partition("images", 0): 200})
    assert letters(tmp_path)[0]["detail"] == "first" and dead.removed > 100

    dead.committed({Partition("images", 0): 400, Partition("images", 1): 1})
    for offset in range(200, 400):
        dead.put(rejected(offset))
    dead.flush(timeout_s=1)
    assert letters(tmp_path)[0]["detail"] != "first"


def test_a_folder_that_cannot_be_listed_ends_no_agent_and_costs_no_letter(tmp_path, monkeypatch):
    dead = FileDeadLetters(tmp_path, max_bytes=80_000)
    dead.put(rejected(1))
    dead.flush(timeout_s=1)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refused)  # which `glob` keeps to itself
        dead.committed({Partition("images", 0): 2})

    assert [letter["offset"] for letter in letters(tmp_path)] == [1]


def test_each_commit_tells_in_the_log_what_was_set_aside_since_the_one_before(tmp_path, caplog):
    dead = FileDeadLetters(tmp_path, max_bytes=2**20)
    dead.put(rejected(1))
    dead.put(rejected(2))
    dead.put(Rejected(Partition("images", 0), 3, Reason.EMPTY, "cat/2.jpg: no bytes"))
    assert not caplog.messages
    dead.committed({Partition("images", 0): 9})
    dead.committed({Partition("images", 0): 10})
    assert caplog.messages == [f"records set aside in {tmp_path}: 2 truncated, 1 empty"]
    dead.put(rejected(11))
    dead.committed({Partition("images", 0): 12})
    assert caplog.messages[1:] == [f"records set aside in {tmp_path}: 1 truncated"]
