"""The doctor on a real broker: topics, their dead letters, the position of the commit; nothing is created."""

from __future__ import annotations

from pathlib import Path

from agent.config import Config
from agent.doctor import Finding, _looked_at, _source
from agent.values import Commit
from streams.record import Partition


def findings(bootstrap: str, topic: str, commit: Commit | None = None, **kafka: object) -> list[Finding]:
    kafka |= {"bootstrap_servers": (bootstrap,), "topics": (topic,)}
    config = Config.model_validate({"source": {"kind": "kafka", "kafka": kafka}})
    return list(_looked_at("source", "look there", lambda: _source(config, commit)))


def test_it_says_where_reading_begins_and_makes_no_dead_letter_topic(bootstrap, new_topic, producer, admin):
    topic = new_topic(partitions=2)
    for partition in (0, 1, 1):
        producer.send(topic, b"image", partition=partition).get(10)

    source, letters = findings(bootstrap, topic, start="latest")

    assert source.level == "ok" and f"read from {topic}/0:1, {topic}/1:2" in source.text
    assert letters.level == "warning" and f"{topic}.dlq" in letters.text
    [refused] = [found for found in findings(bootstrap, topic, dead_letter_create=False) if found.about == "letters"]
    assert refused.level == "problem"
    assert f"{topic}.dlq" not in admin.list_topics()


def test_a_dead_letter_topic_that_is_there_is_fine(bootstrap, new_topic):
    topic = new_topic()
    new_topic(name=f"{topic}.dlq")
    assert [found.level for found in findings(bootstrap, topic)] == ["ok", "ok"]


def test_a_topic_that_is_not_there_is_a_problem(bootstrap):
    (found,) = findings(bootstrap, "nowhere")
    assert found.level == "problem" and "nowhere" in found.text and found.cure == "look there"


def test_a_commit_of_another_topic_is_a_problem(bootstrap, new_topic, tmp_path: Path):
    topic = new_topic()
    commit = Commit(7, tmp_path, {Partition("list", 0): 3}, "archive 123", (), 1, {}, {}, None)

    (found,) = findings(bootstrap, topic, commit)

    assert found.level == "problem" and "not the stream" in found.text
