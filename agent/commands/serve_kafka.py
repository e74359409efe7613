"""`gapstream serve --kafka`: images of topics in, predictions out, each exactly once for readers of committed messages.

While a batch is in the model, the images of the next are fetched and decoded, and the answers before are committed. A
prediction is JSON under its image's key: `release`, `labels` and `scores`, or `error` and `detail`; and `origin`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
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
from streams.kafka.exchange import Arrival, Exchange, Moved, Reply
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
and those of _AHEAD batches are in memory, each up to source.max_image_bytes."""
_AHEAD = 2
"""Batches whose images are in memory as pixels: one in the model and the one after it, so that the decoders work while
the model does. More would take more memory and make nothing faster, as the slower of the two is never without work."""
_OVERHEAD = 256
"""Bytes left free in a message for what `message_size` does not count: lengths, the time, and the head of the batch it
is sent in, which take about a hundred. A prediction that does not fit is answered by an error that does."""

Refusal = tuple[str, str]
"""The reason why a message has no prediction (streams.record.Reason), and the detail."""


Answer = Prediction | Refusal | None
"""What is said to a message; None for marks, which are passed without an answer."""


@dataclass(eq=False)
class _Batch:
    """Messages whose images go through the model together, on their way there."""

    arrivals: Sequence[Arrival]
    taken: float
    """When they were taken, by time.monotonic()."""
    last: bool
    """Whether a transaction ends with them: nothing was taken together with them and comes after them."""
    items: Sequence[Record | Rejected | Control] = ()
    """What they stand for, once images elsewhere are fetched."""
    dropped: bool = False
    """Whether nobody waits for it any more."""
    prepared: Future[list[Prepared | Refusal | None]] = field(default_factory=Future)


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
        self._fetching = threading.Semaphore(_FETCHES)
        """Held while an image is fetched: two batches fetch theirs at a time."""
        self._top = top
        self._headers = frozenset(headers)
        self._max_batch = max_batch
        self._ahead: deque[_Batch] = deque()
        """What is prepared for the model, or has been."""
        self._rest: Sequence[Arrival] = ()
        """What was taken and is not in `_ahead` yet."""
        self._answered: list[tuple[Arrival, Answer]] = []
        """What the next transaction passes."""
        self._came = self._taken = self._beat = time.monotonic()
        """When `_rest` was taken; when the first of `_answered` was; a sign of life that threads write and /livez
        reads."""
        self._again = False
        """Whether messages are held no more that were taken and not answered."""
        self._failure = ""
        self._failures = 0
        """In a row, without a transaction that ended well."""
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
        while not self._stopping():
            self._beat = time.monotonic()
            classifier = self._classifier()
            try:
                if classifier is None:
                    time.sleep(_POLL_S)
                else:
                    self._step(classifier)
                self._show_lag()
            except Moved as moved:
                log.info("%s", moved)
                self._drop()
            except Exception as error:  # the thread must outlive whatever happens: nobody would start it again
                self._drop()
                self._failures += 1
                wait = min(_WAIT_S[0] * 2 ** (self._failures - 1), _WAIT_S[1])
                self._failure = f"{error}; tried again in {wait:.1f} s"
                log.warning("%s", self._failure, exc_info=not isinstance(error, StreamError))
                self._sleep(wait)
        try:
            self._commit()
            self._exchange.settle()
        except Exception as error:
            log.warning("%s", error, exc_info=not isinstance(error, StreamError))
        self._exchange.close()
        self._decoders.close()

    def _sleep(self, seconds: float) -> None:
        """Wait, but not for a stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping():
            time.sleep(min(0.2, seconds))

    def _step(self, classifier: Classifier) -> None:
        """Answer one batch, with the next one in preparation meanwhile and the transaction before under way."""
        if self._again:
            self._exchange.take_again()
            self._again = False
        self._look_ahead(classifier)
        if not self._ahead:
            self._failure = ""
            return
        batch = self._ahead.popleft()
        answers = self._classified(batch, classifier)
        if not self._answered:
            self._taken = batch.taken
        self._answered += zip(batch.arrivals, answers, strict=False)
        short = len(answers) < len(batch.arrivals)
        late = not batch.last and time.monotonic() > batch.taken + _BATCH_S
        if batch.last or short or late:
            self._commit()
        if short or late:
            self._drop()

    def _look_ahead(self, classifier: Classifier) -> None:
        """Have _AHEAD batches prepared, as far as there are messages; waits for some where there is nothing to do."""
        while len(self._ahead) < _AHEAD:
            if not self._rest:
                self._rest = self._exchange.take(0)
                if not self._rest and not self._ahead:
                    self._exchange.settle()
                    self._show_lag()  # of what was just committed, and not once the wait is over
                    self._rest = self._exchange.take(_POLL_S)
                if not self._rest:
                    return
                self._came = time.monotonic()
            arrivals = self._part(self._rest)
            self._rest = self._rest[len(arrivals) :]
            batch = _Batch(arrivals, self._came, not self._rest)
            batch.prepared = in_background(partial(self._prepare, batch, classifier), "prepare")
            self._ahead.append(batch)

    def _drop(self) -> None:
        """Forget what is not in a transaction yet, which is taken again."""
        for batch in self._ahead:
            batch.dropped = True
        self._ahead.clear()
        self._rest, self._answered = (), []
        self._again = True

    def _commit(self) -> None:
        """Begin a transaction that answers all that has an answer. Raises StreamError when the one before has failed,
        which is waited for."""
        if not self._answered:
            return
        answered, self._answered = self._answered, []
        replies, rejected = [], Counter[str]()
        for arrival, answer in answered:
            if answer is not None:
                reply, reason = self._reply(arrival, answer)
                replies.append(reply)
                rejected[reason] += 1
        topics = Counter(arrival.item.partition.topic for arrival, _ in answered)
        outcome = self._exchange.commit([arrival for arrival, _ in answered], replies)
        outcome.add_done_callback(partial(self._count, self._taken, topics, rejected))

    def _count(self, taken: float, topics: Counter[str], rejected: Counter[str], outcome: Future[None]) -> None:
        """Count a transaction that has ended, and what it has answered; called in its thread."""
        if outcome.exception() is not None:  # only transactions count it; messages count when they are committed
            self._metrics.transactions.labels("aborted").inc()
            return
        self._failure, self._failures = "", 0
        self._metrics.transactions.labels("committed").inc()
        self._metrics.seconds.observe(time.monotonic() - taken)
        for topic, count in topics.items():
            self._metrics.records.labels(topic).inc(count)
        self._metrics.predictions.inc(rejected.pop("", 0))
        for reason, count in rejected.items():
            self._metrics.rejected.labels(reason).inc(count)

    def _classified(self, batch: _Batch, classifier: Classifier) -> list[Answer]:
        """Find what is to be said to each message. Only the first are answered where fetching and decoding took until
        the transaction must end."""
        found = batch.prepared.result()
        while True:
            usable = [image for image in found if isinstance(image, Prepared)]
            try:
                predictions = iter(classifier.classify(usable, self._top))
            except ReleaseError as error:  # a new release with another preprocessing came in between
                log.info("%s", error)
                found = list(self._prepared(batch, classifier))
                continue
            return [next(predictions) if isinstance(image, Prepared) else image for image in found]

    def _prepare(self, batch: _Batch, classifier: Classifier) -> list[Prepared | Refusal | None]:
        """Fetch images that are elsewhere, and decode all."""
        waiting = [
            in_background(partial(self._in_turn, arrival.item), "image-fetch")
            if isinstance(arrival.item, Claim)
            else arrival.item
            for arrival in batch.arrivals
        ]
        batch.items = [item.result() if isinstance(item, Future) else item for item in waiting]
        return list(self._prepared(batch, classifier))

    def _in_turn(self, claim: Claim) -> Record | Rejected:
        """Fetch an image once fewer than _FETCHES are being fetched."""
        with self._fetching:
            return self._fetch(claim)

    def _prepared(self, batch: _Batch, classifier: Classifier) -> Iterator[Prepared | Refusal | None]:
        """Decode images for the model, or say why one cannot be; None for a mark. Ends after the first that is there
        when the transaction must end, or later: images made to be slow take many seconds each."""
        preprocess = classifier.release.preprocess
        images = (item.image for item in batch.items if isinstance(item, Record))
        with contextlib.closing(self._decoders.pixels(images, preprocess)) as decoded:
            for item in batch.items:
                if isinstance(item, Record):
                    pixels = next(decoded)
                    self._beat = time.monotonic()
                    if isinstance(pixels, ImageError):
                        yield pixels.reason, pixels.detail
                    else:
                        yield Prepared(pixels, preprocess)
                else:
                    yield (item.reason, item.detail) if isinstance(item, Rejected) else None
                if time.monotonic() > batch.taken + _BATCH_S or batch.dropped or self._stopping():
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
