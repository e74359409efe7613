"""What the configuration of [source.kafka] refuses."""

from __future__ import annotations

import pytest

from agent.config import ConfigError, load

KEY = "source.kafka.dead_letter_topic"


@pytest.mark.parametrize(
    "name", ["{topic}", "", "{other}.dlq", "{topic.x}", "{}.dlq", "{topic!r}", "{topic", "a b", "ä"]
)
def test_a_dead_letter_topic_without_a_name_of_its_own_is_a_mistake(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {KEY} \(--set\): got .* expected a topic's name of its own"):
        load(None, {}, {KEY: name})


@pytest.mark.parametrize(
    ("topics", "given", "name"),
    [("a,b", {KEY: "b"}, "b"), ("a,a.dlq", {}, "a.dlq"), ("a,dead-a", {KEY: "dead-{topic}"}, "dead-a")],
)
def test_a_dead_letter_topic_that_is_read_itself_is_a_mistake(topics: str, given: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {KEY}[^:]*: got .* would go to {name}, which is read itself"):
        load(None, {}, {"source.kafka.topics": topics, **given})


@pytest.mark.parametrize("name", ["{topic}.dlq", "rejected", "dead-{topic}"])
def test_a_dead_letter_topic_of_its_own_is_taken(name: str) -> None:
    config = load(None, {}, {KEY: name, "source.kafka.topics": "a,b"})
    assert config.source.kafka.dead_letter_topic == name
