"""`gapstream serve --kafka`: images of topics in, predictions out, each exactly once for readers of committed messages.

A prediction is JSON under its image's key: `release`, `labels` and `scores`, or `error` and `detail`; and `origin`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from agent.commands.waiting import when_there
from agent.config import Config, ConfigError
from agent.parts import codec, image_store, open_exchange
from exporter.decoders import Decoders
from exporter.image_header import ImageError
from exporter.release import ReleaseError
from exporter.runtime import Classifier, Prediction, Prepared
from exporter.serve import Server
from exporter.serving_metrics import KafkaMetrics
from streams.background import in_background
from streams.claims import ImageStore
from streams.dead_letter_format import message_size
from streams.formats import CONTENT_TYPE, JSON, Claim, Codec
from streams.kafka.exchange import Arrival, Exchange, Reply
from streams.record import Control, Partition, Reason, Record, Rejected, Unreachable
from streams.source import StreamError

log = logging.getLogger(__name__)

STALLED_S = 300
"""/livez fails when the thread that answers was silent for this number of seconds. It says something after every batch,
and the slowest fetches images, each in four requests of at most 30 s, and then waits for a commit; with less, an image
store in trouble would restart the process, which does not help it. 300 s is also when Kafka itself gives up a consumer
that does not poll (max.poll.interval.ms of the client)."""
_POLL_S = 0.5
"""Seconds of one look for messages, or for the first release; a stop is noticed that much later."""
_BATCH_S = 30
"""After this number of seconds of answering, what is answered is committed and the rest is taken again. A consumer must
poll once in 300 s or loses its partitions, and a slow model would not get through `max_records` images by then."""
_STOP_S = 8
"""Seconds that the thread gets to end once HTTP has ended. A commit that the brokers do not answer takes longer and is
left behind: `docker stop` kills after 10 s, and what is not committed is taken again."""
_WAIT_S = (0.5, 30)
"""Seconds between attempts, the first and the longest: they double, so that brokers in trouble are asked less and less.
Chosen by hand; a larger longest wait delays the first answers after the brokers are back by as much."""
_FETCHES = 8
"""Images fetched at once, as many as the learner's source fetches; chosen by hand. More ask more of the image store,
and all of them are in memory, each up to source.max_image_bytes."""
_OVERHEAD = 256
"""Bytes left free in a message for what `message_size` does not count: lengths, the time, and the head of the batch it
is sent in, which take about a hundred. A prediction that does not fit is answered by an error that does."""

Refusal = tuple[str, str]
"""The reason why a message has no prediction (streams.record.Reason), and the detail."""


@contextlib.contextmanager
def beside(config: Config, server: Server, stop: threading.Event) -> Iterator[None]:
    """Answer the configured topics while the block runs, which runs `server`. The block begins once the topics are
    there, or when `stop` was set before. Raises ConfigError, StreamError."""
    section = config.serve.kafka
    if not section.topics:
        raise ConfigError('serve.kafka.topics is empty; expected the topics to answer, like ["images"]')
    if section.group == config.source.kafka.group:
        raise ConfigError(
            f"serve.kafka.group: got {section.group}, which is source.kafka.group, where the learner writes its "
            "offsets; expected a group of its own"
        )
    decoder, images = codec(config, labelled=False), image_store(config)
    exchange = when_there(lambda: open_exchange(config, create=section.create), stop)
    if exchange is None:
        yield
        return
    responder = Responder(
        exchange,
        lambda: server.classifier,
        KafkaMetrics(server.registry, Reason),
        lambda: server.stopping,
        Decoders(config.source.max_image_pixels),
        fetch=lambda claim: _fetched(claim, decoder, images),
        top=section.top,
        headers=section.headers,
        max_batch=config.serve.max_batch,
    )
    server.watch(responder)
    responder.start()
    log.info("answering %s in %s", ", ".join(section.topics), section.output)
    try:
        yield
    finally:
        server.stop()
        responder.join()


class Responder:
    """Takes messages, classifies their images and gives the answers back, in a thread of its own.

    It is what `Server.watch` asks about its health. A failure of whatever kind is logged and tried again: the messages
    come back, since nothing of their transaction was committed.
    """

    def __init__(
        self,
        exchange: Exchange,
        classifier: Callable[[], Classifier | None],
        metrics: KafkaMetrics,
        stopping: Callable[[], bool],
        decoders: Decoders,
        *,
        fetch: Callable[[Claim], Record | Rejected],
        top: int = 5,
        headers: Sequence[str] = (),
        max_batch: int = 64,
    ) -> None:
        """`classifier` gives what answers; while it gives None nothing is taken. `stopping` says when to end, and
        `decoders` are closed then. `fetch` gets the image of a message that only points at one. A prediction lists
        `top` classes (0: all) and carries the message's headers of the names in `headers`. `max_batch` images go
        through the model at once."""
        self._exchange = exchange
        self._classifier = classifier
        self._metrics = metrics
        self._stopping = stopping
        self._fetch = fetch
        self._top = top
        self._headers = frozenset(headers)
        self._max_batch = max_batch
        self._failure = ""
        self._beat = time.monotonic()  # written by the thread, read by /livez; a float is one assignment
        self._shown: set[Partition] = set()
        self._decoders = decoders
        self._thread = threading.Thread(target=self._run, name="kafka-responder", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end that `stopping` has asked for; what is left undone is taken again by whoever comes next."""
        self._thread.join(_STOP_S)
        if self._thread.is_alive():
            log.warning("Kafka did not answer within %d s and is left behind; nothing is lost", _STOP_S)

    def why_not_alive(self) -> list[str]:
        """Give the reasons why the process should be started anew; empty when all is well."""
        silent = time.monotonic() - self._beat
        reasons = [f"the Kafka thread was last seen {silent:.0f} s ago"] if silent > STALLED_S else []
        return reasons + self._decoders.why_not_alive()

    def why_not_ready(self) -> list[str]:
        """Give the reasons why nothing is answered at present; empty when all is well."""
        if self._failure:
            return [self._failure]
        return [] if self._exchange.joined else ["the consumer group has not been joined yet"]

    def _run(self) -> None:
        failures = 0
        while not self._stopping():
            self._beat = time.monotonic()
            classifier = self._classifier()
            try:
                if classifier is None:
                    time.sleep(_POLL_S)
                elif arrivals := self._exchange.take(_POLL_S):
                    self._answer(arrivals, classifier)
                    failures = 0
                self._failure = ""
                self._show_lag()
            except Exception as error:  # the thread must outlive whatever happens: nobody would start it again
                failures += 1
                wait = min(_WAIT_S[0] * 2 ** (failures - 1), _WAIT_S[1])
                self._failure = f"{error}; tried again in {wait:.1f} s"
                log.warning("%s", self._failure, exc_info=not isinstance(error, StreamError))
                self._sleep(wait)
        self._exchange.close()
        self._decoders.close()

    def _sleep(self, seconds: float) -> None:
        """Wait, but not for a stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping():
            time.sleep(min(0.2, seconds))

    def _answer(self, arrivals: Sequence[Arrival], classifier: Classifier) -> None:
        """Answer all of them in one transaction, or only the first where it takes long or the end has come."""
        began = time.monotonic()
        answers: list[Prediction | Refusal | None] = []
        while len(answers) < len(arrivals) and not (self._stopping() or time.monotonic() - began > _BATCH_S):
            self._beat = time.monotonic()
            answers += self._classified(self._part(arrivals[len(answers) :]), classifier, began + _BATCH_S)
        if not answers:
            return
        done = arrivals[: len(answers)]
        replies, rejected = [], Counter[str]()
        for arrival, answer in zip(done, answers, strict=True):
            if answer is not None:
                reply, reason = self._reply(arrival, answer)
                replies.append(reply)
                rejected[reason] += 1
        try:
            self._exchange.commit(done, replies)
        except StreamError:  # only transactions count it; messages count when they are committed
            self._metrics.transactions.labels("aborted").inc()
            raise
        self._metrics.transactions.labels("committed").inc()
        self._metrics.seconds.observe(time.monotonic() - began)
        for topic, count in Counter(arrival.item.partition.topic for arrival in done).items():
            self._metrics.records.labels(topic).inc(count)
        self._metrics.predictions.inc(rejected.pop("", 0))
        for reason, count in rejected.items():
            self._metrics.rejected.labels(reason).inc(count)

    def _classified(
        self, arrivals: Sequence[Arrival], classifier: Classifier, until: float
    ) -> list[Prediction | Refusal | None]:
        """Find what is to be said to each message; None for marks, which are passed without an answer. Only the first
        are answered where decoding takes longer than `until`."""
        waiting = [
            in_background(partial(self._fetch, arrival.item), "image-fetch")
            if isinstance(arrival.item, Claim)
            else arrival.item
            for arrival in arrivals
        ]
        items = [item.result() if isinstance(item, Future) else item for item in waiting]
        while True:
            found = list(self._prepared(items, classifier, until))
            usable = [image for image in found if isinstance(image, Prepared)]
            try:
                predictions = iter(classifier.classify(usable, self._top))
            except ReleaseError as error:  # a new release with another preprocessing came in between
                log.info("%s", error)
                continue
            return [next(predictions) if isinstance(image, Prepared) else image for image in found]

    def _prepared(
        self, items: Sequence[Record | Rejected | Control], classifier: Classifier, until: float
    ) -> Iterator[Prepared | Refusal | None]:
        """Decode images for the model, or say why one cannot be; None for a mark. Ends after the first that is there at
        `until` or later: images made to be slow take many seconds each."""
        preprocess = classifier.release.preprocess
        images = (item.image for item in items if isinstance(item, Record))
        with contextlib.closing(self._decoders.pixels(images, preprocess)) as decoded:
            for item in items:
                if isinstance(item, Record):
                    pixels = next(decoded)
                    self._beat = time.monotonic()
                    if isinstance(pixels, ImageError):
                        yield pixels.reason, pixels.detail
                    else:
                        yield Prepared(pixels, preprocess)
                else:
                    yield (item.reason, item.detail) if isinstance(item, Rejected) else None
                if time.monotonic() > until or self._stopping():
                    return

    def _part(self, arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
        """Choose the first, to be answered together: a batch of images, or fewer where _FETCHES have to be fetched."""
        fetches = 0
        for number, arrival in enumerate(arrivals[: self._max_batch], 1):
            fetches += isinstance(arrival.item, Claim)
            if fetches == _FETCHES:
                return arrivals[:number]
        return arrivals[: self._max_batch]

    def _reply(self, arrival: Arrival, answer: Prediction | Refusal) -> tuple[Reply, str]:
        """Write the reply to a message; gives it with the reason why it has no prediction (empty when it has one).

        What is too long for the output topic becomes an error, at last without key and headers: one reply that cannot
        be sent would hold up the partition for ever.
        """
        most = self._exchange.max_reply_bytes - _OVERHEAD
        topic, partition = arrival.item.partition
        place = {"topic": topic, "partition": partition, "offset": arrival.item.offset}
        origin = {"origin": place | {"timestamp_ms": arrival.timestamp_ms}}
        key = arrival.raw.key if arrival.raw else None
        headers = arrival.raw.headers if arrival.raw else ()
        carried = [(name, value or b"") for name, value in headers if name in self._headers]
        if isinstance(answer, Prediction):
            body = {"release": answer.release, "labels": answer.labels, "scores": answer.scores}
            reply = _message(key, carried, body | origin)
            if message_size(*reply) <= most:
                return reply, ""
            size = message_size(*reply)
            detail = f"the prediction takes {size} bytes with key and headers, at most {most}; both are left out"
            answer = Reason.TOO_LARGE, detail
            key, carried = None, []
        reason, detail = answer
        reply = _message(key, carried, {"error": reason, "detail": detail} | origin)
        if message_size(*reply) > most:
            reply = _message(None, [], {"error": reason, "detail": detail} | origin)
        return reply, reason

    def _show_lag(self) -> None:
        """Set the lag of the partitions held now; those that went to another process are its to show."""
        lag = self._exchange.lag()
        for where in self._shown - lag.keys():
            self._metrics.lag.remove(*where)
        for where, waiting in lag.items():
            self._metrics.lag.labels(*where).set(waiting)
        self._shown = set(lag)


def _fetched(claim: Claim, decoder: Codec, images: ImageStore | None) -> Record | Rejected:
    """Fetch the image of a message that only points at one.

    A store that is away is an answer too: the learner waits for it, but who asked here waits for a prediction.
    """
    try:
        return decoder.fetch(claim, images.fetch if images else None)
    except Unreachable as error:
        return Rejected(claim.partition, claim.offset, Reason.FETCH_FAILED, str(error), claim.raw)


def _message(key: bytes | None, headers: list[tuple[str, bytes]], body: dict[str, Any]) -> Reply:
    # Text out of a message may hold half a surrogate pair, which JSON can spell and UTF-8 cannot.
    value = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Reply(key, value, [*headers, (CONTENT_TYPE, JSON.encode())])
