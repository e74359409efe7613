"""Playing an archive into a topic, and reading it back: the same records, classes and tasks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from agent.cli import main
from streams.archive import ArchiveSource
from streams.kafka.connection import Connection
from streams.kafka.produce import create_topic, play
from streams.kafka.source import KafkaSource
from streams.record import Control, ControlKind, Partition, Reason, Record
from streams.source import StreamError
from tests.bad_images import encoded, picture
from tests.kafka.records import CODEC, read


def archive(folder: Path) -> Path:
    """Four classes of five images, one of them broken."""
    for name in "abcd":
        (folder / name).mkdir(parents=True)
        for number in range(5):
            (folder / name / f"{number}.jpg").write_bytes(encoded(picture(seed=number), "JPEG") + name.encode())
    (folder / "a/0.jpg").write_bytes(b"broken")
    return folder


def test_what_is_played_comes_back_in_order_with_its_marks(bootstrap: str, new_topic: Any, tmp_path: Path) -> None:
    topic = new_topic(3)
    where = Connection([bootstrap])
    stream = ArchiveSource(archive(tmp_path / "images"), classes_per_task=2)
    items = []
    while not stream.exhausted:
        items += stream.poll(0)
    seen = []

    played = play(items, where, topic, on_progress=lambda so_far: seen.append(so_far.records))

    good = [item for item in items if isinstance(item, Record | Control)]
    assert (played.records, played.boundaries, seen[-1]) == (19, 2, 19)
    assert played.skipped == {Reason.UNSUPPORTED_FORMAT: 1}
    source = KafkaSource(where, [topic], CODEC, group="", merge_wait_s=0.2)
    source.seek({})
    back = read(source, 21)
    source.close()
    tasks: list[list[str]] = [[]]
    for item in back:
        if isinstance(item, Control):
            assert item.kind == ControlKind.TASK_BOUNDARY
            tasks.append([])
        elif isinstance(item, Record):
            tasks[-1].append(item.label)
    expected: list[list[str]] = [[]]
    for item in good:
        if isinstance(item, Control):
            expected.append([])
        elif isinstance(item, Record):
            expected[-1].append(item.label)
    assert [sorted(task) for task in tasks] == [sorted(task) for task in expected]
    images = {item.image for item in back if isinstance(item, Record)}
    assert images == {item.image for item in good if isinstance(item, Record)}
    assert len({item.partition for item in back}) == 3


def test_the_rate_is_kept_and_a_stop_is_heard(bootstrap: str, new_topic: Any, tmp_path: Path) -> None:
    topic = new_topic()
    stop = threading.Event()
    here = Partition("a", 0)
    items = [Record(here, number, "cat", b"x") for number in range(10_000)]
    threading.Timer(1, stop.set).start()
    played = play(items, Connection([bootstrap]), topic, rate=50, stop=stop)
    assert 20 <= played.records <= 70


def test_a_topic_is_created_once_and_a_missing_one_is_said(
    bootstrap: str, new_topic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka.produce.CONNECT_S", 1)
    topic = new_topic() + "-more"
    where = Connection([bootstrap])
    with pytest.raises(StreamError, match="no topic"):
        play([], where, topic)
    assert create_topic(where, topic, 2) and not create_topic(where, topic, 2)


def test_the_commands_play_run_into_rejection_list_and_replay(
    bootstrap: str, new_topic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topic = new_topic()
    settings = ["--set", f"source.kafka.bootstrap_servers={bootstrap}", "--set", f"source.kafka.topics={topic}"]
    images = archive(tmp_path / "images")
    assert main(["produce", str(images), "--no-boundaries", *settings]) == 0
    said = capsys.readouterr()
    assert "19 records" in said.out and "\n1 images skipped: 1 unsupported_format" in said.out
    assert "19/19" in said.err
    assert main(["produce", str(images), "--tasks", "1", "--order", "classes", *settings]) == 0
    assert "1 marks acknowledged" in capsys.readouterr().out
    assert main(["dlq", *settings]) == 1
    assert "no dead-letter topic" in capsys.readouterr().err
    new_topic(name=f"{topic}.dlq")
    assert main(["dlq", *settings]) == 0 and "no dead letters" in capsys.readouterr().out
    assert main(["dlq", "replay", *settings]) == 0 and "0 records sent again" in capsys.readouterr().out
    assert main(["produce", str(images)]) == 78
    assert "--topic is missing" in capsys.readouterr().err


def test_playing_nothing_is_a_failure(
    bootstrap: str, new_topic: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--bootstrap", bootstrap, "--topic", new_topic()]
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/0.jpg").write_bytes(b"broken")
    assert main(["produce", str(tmp_path / "images"), *settings]) == 1
    said = capsys.readouterr().out
    assert "0 records" in said and "1 images skipped" in said


def test_a_topic_that_is_on_its_way_is_waited_for(bootstrap: str, new_topic: Any, tmp_path: Path) -> None:
    topic = f"{new_topic()}-later"
    threading.Timer(3, lambda: new_topic(name=topic)).start()
    images = archive(tmp_path / "images")
    assert main(["produce", str(images), "--bootstrap", bootstrap, "--topic", topic]) == 0


def test_a_topic_that_does_not_come_is_said(
    bootstrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka.produce.CONNECT_S", 1)
    monkeypatch.setattr("agent.commands.waiting.WAIT_S", 2)
    images = archive(tmp_path / "images")
    assert main(["produce", str(images), "--bootstrap", bootstrap, "--topic", "nowhere"]) == 1
    assert "has no topic nowhere; create it first" in capsys.readouterr().err
