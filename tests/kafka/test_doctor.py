"""The doctor on a real broker: topics, their dead letters, the position of the commit; nothing is created."""

from __future__ import annotations

from pathlib import Path

from agent.commands.doctor import Finding, _answers, _fleet, _looked_at, _source
from agent.config import Config
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
    [refused] = [found for found in findings(bootstrap, topic, dead_letter_create=False) if found.about == "rejected"]
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


def test_topics_to_answer_are_looked_at_and_none_is_made(bootstrap, new_topic, admin):
    topic = new_topic()

    def found(**section: object) -> Finding:
        serve = {"kafka": {"topics": (topic,), "output": f"{topic}.out", **section}}
        source = {"kafka": {"bootstrap_servers": (bootstrap,)}}
        config = Config.model_validate({"serve": serve, "source": source})
        [finding] = _looked_at("answers", "look there", lambda: _answers(config))
        return finding

    assert found().level == "warning" and f"{topic}.out" in found().text
    assert found(create=False).level == "problem"
    assert found(topics=("nowhere",)).level == "problem"
    assert f"{topic}.out" not in admin.list_topics()
    new_topic(name=f"{topic}.out")
    assert found().level == "ok"
    assert list(_answers(Config())) == []


def test_the_topic_of_a_fleet_is_looked_at_and_none_is_made(bootstrap, new_topic, producer, admin, tmp_path: Path):
    def found(topic: str) -> list[Finding]:
        sections = {"fleet": {"topic": topic, "site": "a"}, "state": {"path": tmp_path}}
        config = Config.model_validate({**sections, "source": {"kafka": {"bootstrap_servers": (bootstrap,)}}})
        return list(_looked_at("fleet", "look there", lambda: _fleet(config)))

    [missing] = found("no-fleet-yet")
    assert missing.level == "warning" and "no-fleet-yet" in missing.text
    assert "no-fleet-yet" not in admin.list_topics()
    topic = new_topic(1, **{"cleanup.policy": "compact", "max.message.bytes": "20000"})
    producer.send(topic, b"part of a state", b"b/0").get(10)
    [good] = found(topic)
    assert good.level == "ok" and "1 message(s), at most 18" in good.text
    other = new_topic(2, **{"max.message.bytes": "900"})
    assert [finding.level for finding in found(other)] == ["problem", "warning", "warning"]
