"""What is answered to the messages of a topic, without a broker: predictions, errors, sizes, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent.cli import main
from agent.commands import serve_kafka
from agent.commands.serve_kafka import Responder
from agent.config import load
from exporter.decoders import Decoders
from exporter.release import ReleaseError
from exporter.runtime import Classifier
from exporter.serving_metrics import KafkaMetrics
from streams.formats import Claim, Codec
from streams.kafka.exchange import Arrival, Moved, Reply
from streams.record import Partition, Raw, Reason, Record, Rejected, Unreachable
from streams.source import StreamError
from tests.bad_images import TOO_SLOW, slow_image
from tests.processes import gapstream, running, until
from tests.test_runtime import State, Toy, picture, png

README = (Path(__file__).parent.parent / "deploy/README.md").read_text(encoding="utf-8")
PLACE = Partition("images", 1)
CODEC = Codec(max_image_bytes=10**6, max_image_pixels=10**6, max_label_chars=200, labelled=False)
SHA256 = "0" * 64


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> State:
    state = State(tmp_path_factory.mktemp("state"))
    state.commit(Toy(5, seed=1))
    return state


class ListExchange:
    """Gives the messages, ten at a time, and keeps the replies; what was not committed is given again."""

    joined = True

    def __init__(self, arrivals: Sequence[Arrival], max_reply_bytes: int = 10**6, held: bool = False) -> None:
        """`held`: a transaction ends when the next call that waits for it does, and not before."""
        self.max_reply_bytes = max_reply_bytes
        self.left = list(arrivals)
        self.replies: list[Reply] = []
        self.commits: list[int] = []
        self.failures: list[StreamError] = []
        self.moves: list[int] = []
        """The partitions move when so many messages are taken."""
        self.closed = False
        self.under_way: Callable[[], None] | None = None
        self._taken = 0
        self._in_transaction = 0
        self._held = held

    def take(self, timeout_s: float) -> Sequence[Arrival]:
        if self._taken in self.moves:
            self.moves.remove(self._taken)
            self._taken = 0
            self.settle()
            raise Moved("the group moves its partitions")
        begin = self._in_transaction + self._taken
        found = self.left[begin : begin + 10]
        if not found:
            time.sleep(0.002)
        self._taken += len(found)
        return found

    def take_again(self) -> None:
        self.settle()
        self._taken = 0

    def commit(self, arrivals: Sequence[Arrival], replies: Sequence[Reply]) -> Future[None]:
        self.settle()
        assert list(arrivals) == self.left[: len(arrivals)] and len(arrivals) <= self._taken
        self._taken -= len(arrivals)
        self._in_transaction = len(arrivals)
        outcome: Future[None] = Future()
        self.under_way = lambda: self._end(arrivals, replies, outcome)
        if not self._held:
            self.under_way()
        return outcome

    def _end(self, arrivals: Sequence[Arrival], replies: Sequence[Reply], outcome: Future[None]) -> None:
        if self.failures:
            self._failed = self.failures.pop()
            outcome.set_exception(self._failed)
            self.under_way = self._raise
            return
        self.under_way = None
        self.replies += replies
        self.commits.append(len(arrivals))
        self._in_transaction = 0
        outcome.set_result(None)
        self.left = self.left[len(arrivals) :]

    def _raise(self) -> None:
        self._taken = self._in_transaction = 0
        self.under_way = None
        raise self._failed

    def settle(self) -> None:
        while self.under_way is not None:
            self.under_way()

    def lag(self) -> dict[Partition, int]:
        return {PLACE: len(self.left)}

    def close(self) -> None:
        assert self.under_way is None
        self.closed = True


def arrivals(*values: bytes | None, headers: Sequence[tuple[str, bytes | None]] = ()) -> list[Arrival]:
    found = []
    for offset, value in enumerate(values):
        raw = Raw(b"key %d" % offset, value, tuple(headers))
        found.append(Arrival(CODEC.decode(PLACE, offset, raw, None), 1000 + offset, raw))
    return found


@contextmanager
def answering(exchange: ListExchange, classifier: Any, **settings: Any) -> Iterator[CollectorRegistry]:
    """A responder at work until everything was answered."""
    registry = CollectorRegistry()
    stop = threading.Event()
    settings = {"fetch": lambda claim: CODEC.fetch(claim, None), **settings}
    metrics = KafkaMetrics(registry, Reason)
    responder = Responder(exchange, lambda: classifier, metrics, stop.is_set, Decoders(10**6), **settings)  # type: ignore[arg-type]
    responder.start()
    try:
        wait_for(lambda: not exchange.left)
        yield registry
    finally:
        stop.set()
        responder.join()
    assert exchange.closed


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within 20 s"
        time.sleep(0.005)


def test_an_image_is_answered_as_by_the_classifier_with_its_origin(state):
    classifier = Classifier(state.path)
    image = png(picture(1))
    [expected] = classifier.classify([image], top=2)
    exchange = ListExchange(arrivals(image, headers=[("camera", b"7"), ("label", b"cat"), ("camera", None)]))

    with answering(exchange, classifier, top=2, headers=["camera"]):
        pass

    [reply] = exchange.replies
    assert reply.key == b"key 0"
    assert reply.headers == [("camera", b"7"), ("camera", b""), ("content-type", b"application/json")]
    answer = json.loads(reply.value)
    assert answer["release"] == expected.release and tuple(answer["labels"]) == expected.labels
    assert answer["scores"] == pytest.approx(expected.scores, abs=1e-6)
    assert answer["origin"] == {"topic": "images", "partition": 1, "offset": 0, "timestamp_ms": 1000}


def test_what_cannot_be_answered_gets_its_reason_and_stops_nothing(state):
    # given messages that are broken in different ways, and a mark, around two images
    image = png(picture(1))
    messages = arrivals(image, b"no image", None, image[: len(image) // 2], b'{"image": 7}', image)
    mark = Raw(b"mark", None, (("gapstream.control", b"flush"),))
    messages.append(Arrival(CODEC.decode(PLACE, 6, mark, None), None, mark))
    messages.append(Arrival(Rejected(PLACE, 7, Reason.TOO_LARGE, "its batch cannot be read"), None, None))
    exchange = ListExchange(messages)

    # when they are answered
    with answering(exchange, Classifier(state.path)) as registry:
        pass

    # then each but the mark has an answer, and is counted
    answers = {json.loads(reply.value)["origin"]["offset"]: json.loads(reply.value) for reply in exchange.replies}
    reasons = {offset: answer.get("error") for offset, answer in answers.items()}
    assert reasons == {
        0: None, 1: "unsupported_format", 2: "empty", 3: "truncated", 4: "bad_schema", 5: None, 7: "too_large",
    }  # fmt: skip
    assert all(answer["detail"] for answer in answers.values() if "error" in answer)
    value = registry.get_sample_value
    assert value("gapstream_serve_kafka_records_total", {"topic": "images"}) == 8
    assert value("gapstream_serve_kafka_predictions_total") == 2
    assert value("gapstream_serve_kafka_rejected_records_total", {"reason": "truncated"}) == 1
    assert value("gapstream_serve_kafka_rejected_records_total", {"reason": "bomb"}) == 0
    assert value("gapstream_serve_kafka_transactions_total", {"result": "committed"}) == 1
    assert value("gapstream_serve_kafka_batch_duration_seconds_count") == 1
    wait_for(lambda: value("gapstream_serve_kafka_lag_records", {"topic": "images", "partition": "1"}) == 0)


def test_a_poison_message_is_answered_with_its_error_and_the_partition_goes_on(state, monkeypatch):
    monkeypatch.setattr("exporter.decoder.CPU_S", 0.1)
    monkeypatch.setattr("exporter.decoder.CPU_S_PER_PIXEL", 0.0)
    image, poison = png(picture(1)), slow_image(TOO_SLOW)
    exchange = ListExchange(arrivals(image, poison, image))
    exchange.left[1] = Arrival(Record(PLACE, 1, "", poison), 1001, Raw(b"key 1", poison))

    with answering(exchange, Classifier(state.path)):
        pass

    answers = [json.loads(reply.value) for reply in exchange.replies]
    assert [answer.get("error") for answer in answers] == [None, "bomb", None]


def test_images_made_to_be_slow_are_committed_bit_by_bit(state, monkeypatch):
    # given messages of which the first takes longer to decode than a transaction may last, as a process is started
    monkeypatch.setattr(serve_kafka, "_BATCH_S", 0.02)
    exchange = ListExchange(arrivals(*[png(picture(1))] * 3))

    with answering(exchange, Classifier(state.path)):
        pass

    assert exchange.commits[0] == 1 and len(exchange.replies) == 3


def test_a_store_of_images_that_is_away_is_an_answer():
    class Store:
        def fetch(self, url: str) -> bytes:
            raise Unreachable("nobody at home")

    claim = Claim(PLACE, 3, "", "https://x/a", SHA256, None, None, Raw(b"k", None))
    item = serve_kafka._fetched(claim, CODEC, Store())  # type: ignore[arg-type]
    assert isinstance(item, Rejected) and item.reason == Reason.FETCH_FAILED and item.offset == 3
    assert item.detail == "nobody at home"


def test_an_image_elsewhere_is_fetched_and_a_few_at_a_time(state):
    url = [("image-url", b"https://example.com/a.png"), ("image-sha256", SHA256.encode())]
    exchange = ListExchange(arrivals(*[b""] * 20, headers=url))
    image = png(picture(1))
    busy, most = threading.Semaphore(8), []

    def fetch(claim: Claim) -> Record:
        most.append(busy.acquire(blocking=False))
        time.sleep(0.01)
        busy.release()
        return Record(claim.partition, claim.offset, "", image)

    with answering(exchange, Classifier(state.path), fetch=fetch):
        pass

    assert len(exchange.replies) == 20 and all(b"labels" in reply.value for reply in exchange.replies)
    assert len(most) == 20 and all(most)


def test_what_does_not_fit_into_the_topic_is_answered_without_key_and_headers(state):
    image = png(picture(1))
    exchange = ListExchange(arrivals(image, b"no image", headers=[("camera", b"x" * 3000)]), max_reply_bytes=2000)

    with answering(exchange, Classifier(state.path), headers=["camera"]):
        pass

    first, second = (json.loads(reply.value) for reply in exchange.replies)
    assert first["error"] == "too_large" and "at most" in first["detail"]
    assert second["error"] == "unsupported_format"
    assert [(reply.key, len(reply.headers)) for reply in exchange.replies] == [(None, 1)] * 2


def test_a_transaction_that_fails_is_tried_again_and_counted(state):
    exchange = ListExchange(arrivals(*[png(picture(1))] * 3))
    exchange.failures = [StreamError("3 messages were not answered")]

    with answering(exchange, Classifier(state.path)) as registry:
        pass

    assert len(exchange.replies) == 3
    value = registry.get_sample_value
    assert value("gapstream_serve_kafka_transactions_total", {"result": "aborted"}) == 1
    assert value("gapstream_serve_kafka_predictions_total") == 3


class Moody:
    """A classifier that fails once, in the way it is told."""

    def __init__(self, classifier: Classifier, error: Exception) -> None:
        self._classifier, self._errors = classifier, [error]
        self.release = classifier.release

    def classify(self, images: Any, top: int) -> Any:
        if self._errors:
            raise self._errors.pop()
        return self._classifier.classify(images, top)


@pytest.mark.parametrize("error", [ReleaseError("prepared for another release"), RuntimeError("out of memory")])
def test_a_model_that_fails_loses_no_message(error, state):
    exchange = ListExchange(arrivals(*[png(picture(1))] * 3))

    with answering(exchange, Moody(Classifier(state.path), error)):
        pass

    assert [json.loads(reply.value)["origin"]["offset"] for reply in exchange.replies] == [0, 1, 2]


class Watched:
    """A classifier that tells `watch` the number of each call before it answers."""

    def __init__(self, classifier: Classifier, watch: Callable[[int], None]) -> None:
        self._classifier, self._watch, self._calls = classifier, watch, 0
        self.release = classifier.release

    def classify(self, images: Any, top: int) -> Any:
        self._calls += 1
        self._watch(self._calls)
        return self._classifier.classify(images, top)


def offsets(exchange: ListExchange) -> list[int]:
    return [json.loads(reply.value)["origin"]["offset"] for reply in exchange.replies]


def claims(count: int) -> list[Arrival]:
    return arrivals(
        *[b""] * count, headers=[("image-url", b"https://example.com/a.png"), ("image-sha256", SHA256.encode())]
    )


def test_while_a_batch_is_in_the_model_the_next_is_fetched_and_the_one_before_committed(state):
    # given three transactions of ten, each a batch of eight and one of two
    exchange = ListExchange(claims(30), held=True)
    fetched = [threading.Event() for _ in range(30)]
    seen = []

    def fetch(claim: Claim) -> Record:
        fetched[claim.offset].set()
        return Record(claim.partition, claim.offset, "", png(picture(1)))

    # when the second transaction's first batch is in the model
    def watch(call: int) -> None:
        if call == 3:
            # then the first transaction is under way, the next batch is fetched, and the one after it is not
            seen.append((exchange.under_way is not None, list(exchange.commits)))
            assert all(event.wait(20) for event in fetched[18:20])
            seen.append(fetched[20].is_set())

    with answering(exchange, Watched(Classifier(state.path), watch), fetch=fetch):
        pass
    assert seen == [(True, []), False]
    assert offsets(exchange) == list(range(30)) and exchange.commits == [10, 10, 10]


def test_a_model_that_fails_leaves_the_transaction_before_as_it_is(state):
    exchange = ListExchange(arrivals(*[png(picture(1))] * 20), held=True)
    seen = []

    def watch(call: int) -> None:
        if call == 2:
            seen.append(exchange.under_way is not None)
            raise RuntimeError("out of memory")

    with answering(exchange, Watched(Classifier(state.path), watch)) as registry:
        pass

    assert seen == [True] and offsets(exchange) == list(range(20)) and exchange.commits == [10, 10]
    value = registry.get_sample_value
    assert value("gapstream_serve_kafka_transactions_total", {"result": "committed"}) == 2
    assert value("gapstream_serve_kafka_transactions_total", {"result": "aborted"}) == 0


def test_a_transaction_that_fails_takes_what_was_answered_after_it_along(state):
    # given a transaction that fails while the next messages are in the model
    exchange = ListExchange(arrivals(*[png(picture(1))] * 30), held=True)
    exchange.failures = [StreamError("10 messages were not answered")]

    with answering(exchange, Classifier(state.path)) as registry:
        pass

    # then all come again, in their order
    assert offsets(exchange) == list(range(30))
    value = registry.get_sample_value
    assert value("gapstream_serve_kafka_transactions_total", {"result": "aborted"}) == 1
    assert value("gapstream_serve_kafka_predictions_total") == 30


def test_what_was_taken_before_the_group_moved_its_partitions_is_taken_again(state, caplog):
    # given partitions that move with a transaction under way and ten messages answered or on their way
    exchange = ListExchange(arrivals(*[png(picture(1))] * 40), held=True)
    exchange.moves = [10]

    with answering(exchange, Classifier(state.path)) as registry:
        pass

    # then each is answered once, and that is no failure
    assert offsets(exchange) == list(range(40)) and not exchange.moves
    assert registry.get_sample_value("gapstream_serve_kafka_transactions_total", {"result": "aborted"}) == 0
    assert not [one for one in caplog.records if one.levelname == "WARNING" and one.name.startswith("agent")]


def test_a_stop_waits_for_the_transaction_under_way_and_commits_what_is_answered(state):
    # given a stop while one transaction is under way and the next batch is in the model
    exchange = ListExchange(arrivals(*[png(picture(1))] * 30), held=True)
    stop = threading.Event()
    seen = []

    def watch(call: int) -> None:
        if call == 2:
            seen.append(exchange.under_way is not None)
            stop.set()

    metrics = KafkaMetrics(CollectorRegistry(), Reason)
    watched: Any = Watched(Classifier(state.path), watch)
    fetch = lambda claim: CODEC.fetch(claim, None)  # noqa: E731
    responder = Responder(exchange, lambda: watched, metrics, stop.is_set, Decoders(10**6), fetch=fetch)  # type: ignore[arg-type]
    responder.start()
    responder.join()

    # then both are committed, and the rest is left
    assert seen == [True] and exchange.commits == [10, 10]
    assert len(exchange.left) == 10 and exchange.closed


def test_a_stop_in_the_middle_commits_what_is_answered_and_leaves_the_rest(state):
    # given ten messages, of which two are answered at a time
    exchange = ListExchange(arrivals(*[png(picture(1))] * 10))
    stop = threading.Event()
    classifier = Classifier(state.path)
    calls = []

    class Stopping(Moody):
        def classify(self, images: Any, top: int) -> Any:
            calls.append(len(images))
            if len(calls) == 2:
                stop.set()
            return classifier.classify(images, top)

    # when it is told to stop during the second two
    metrics = KafkaMetrics(CollectorRegistry(), Reason)
    moody: Any = Stopping(classifier, RuntimeError())
    fetch = lambda claim: CODEC.fetch(claim, None)  # noqa: E731
    responder = Responder(exchange, lambda: moody, metrics, stop.is_set, Decoders(10**6), fetch=fetch, max_batch=2)  # type: ignore[arg-type]
    responder.start()
    responder.join()

    # then these four are passed and the others are not
    assert calls == [2, 2] and exchange.commits == [4]
    assert len(exchange.left) == 6 and exchange.closed


def test_without_a_release_nothing_is_taken(state):
    exchange = ListExchange(arrivals(b"x"))
    stop = threading.Event()
    taken = threading.Event()
    exchange.take = lambda timeout_s: taken.set() or []  # type: ignore[method-assign, func-returns-value]
    found: list[Classifier] = []
    metrics = KafkaMetrics(CollectorRegistry(), Reason)
    responder = Responder(
        exchange,  # type: ignore[arg-type]
        lambda: found[0] if found else None,
        metrics,
        stop.is_set,
        Decoders(10**6),
        fetch=lambda claim: CODEC.fetch(claim, None),
    )
    responder.start()
    assert not taken.wait(0.1)
    found.append(Classifier(state.path))
    assert taken.wait(10)
    stop.set()
    responder.join()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "serve.kafka.topics is empty"),
        (["serve.kafka.topics=images", "serve.kafka.group=gapstream"], "expected a group of its own"),
        (["serve.kafka.topics=images,predictions"], "output is predictions, which is one of the topics"),
    ],
)
def test_a_wrong_configuration_is_said_before_anything_begins(settings, said, capsys):
    arguments = [part for setting in ["serve.port=0", *settings] for part in ("--set", setting)]
    assert main(["serve", "--kafka", *arguments]) == 78
    assert said in capsys.readouterr().err


def test_a_cluster_that_does_not_come_ends_it_with_a_clear_message(capsys, monkeypatch):
    monkeypatch.setattr("streams.kafka.connection.CONNECT_S", 0.3)
    monkeypatch.setattr("agent.commands.waiting.WAIT_S", 0)
    settings = ["serve.port=0", "serve.kafka.topics=images", "source.kafka.bootstrap_servers=127.0.0.1:1"]
    assert main(["serve", "--kafka", *(part for setting in settings for part in ("--set", setting))]) == 1
    assert "cannot connect to 127.0.0.1:1" in capsys.readouterr().err


def test_it_waits_for_a_cluster_until_it_is_told_to_stop(tmp_path):
    settings = {"serve__port": 0, "serve__kafka__topics": "images", "source__kafka__bootstrap_servers": "127.0.0.1:1"}
    log = tmp_path / "log"
    hasty = "import sys; from streams.kafka import connection; connection.CONNECT_S = 1; "
    hasty += "from agent.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", hasty, *gapstream("serve", **settings)[3:], "--kafka"]
    with running(command, log) as process:
        until(lambda: "cannot connect to 127.0.0.1:1" in log.read_text(), "a warning", log)
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0


def test_neither_torch_nor_open_clip_is_needed():
    code = "import sys, agent.commands.serve_kafka; print({'torch', 'open_clip'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_settings_can_be_those_of_the_environment():
    config = load(None, {"GAPSTREAM_SERVE__KAFKA__TOPICS": "a,b", "GAPSTREAM_SERVE__KAFKA__TOP": "0"})
    assert config.serve.kafka.topics == ("a", "b") and config.serve.kafka.top == 0


def test_every_metric_is_in_the_readme():
    registry = CollectorRegistry()
    KafkaMetrics(registry, Reason)
    for family in registry.collect():
        name = family.name + {"counter": "_total"}.get(family.type, "")
        assert f"| `{name}` | {family.type} |" in README
        assert f"| {family.documentation} |" in README
