"""`gapstream serve --kafka` against a bare loop with the same client: poll, decode, onnxruntime, produce, commit.

    .venv/bin/python -m tests.bench.bench_exchange [--pairs 7] [--photos 1500] [--small 4000] [--threads 1]

Starts a broker of its own with a topic of photographs of 500 x 400 pixels and one of images of 32 x 32. The loop does
one thing after the other, in transactions of as many messages and with the same settings of the client; it decodes in
its own process, trusts every message, and is not ready for any failure. The two answer a whole topic in turns, each as
a group of its own; of each pair the ratio of their times counts, by the clock and in seconds of the processor, the
decoders' included and the broker's left out. Fails when the exchange is below 0.9 of the loop by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.net.transport import KafkaTCPTransport
from prometheus_client import CollectorRegistry

from agent.commands.serve_kafka import Responder
from exporter.decoders import Decoders
from exporter.runtime import Classifier, Prediction
from exporter.serving_metrics import KafkaMetrics
from streams.formats import Codec
from streams.kafka.connection import Connection
from streams.kafka.exchange import Exchange
from streams.record import Reason
from tests.bad_images import encoded, picture
from tests.bench.bench_inference import load_clip, model, two_releases
from tests.bench.bench_intake import Times
from tests.bench.bench_serving import photo
from tests.bench.results import show
from tests.kafka.broker import Broker

LEAST_RATIO = 0.9
RECORDS = 256
"""Messages of a transaction, the default of serve.kafka.max_records."""
FETCH_BYTES = 16 * 2**20
"""The default of serve.kafka.fetch_bytes."""
PARTITIONS = 2
MAX_PIXELS = 50_000_000
"""The default of source.max_image_pixels."""
AS_IT_COMES = KafkaTCPTransport._sock_recv


def fill(bootstrap: str, topic: str, image: bytes, count: int) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=20)
    for number in range(count):
        producer.send(topic, image, b"%d" % number, [("content-type", b"image/jpeg")], partition=number % PARTITIONS)
    producer.flush()
    producer.close()


def begin(consumer: KafkaConsumer) -> None:
    """Have the consumer join its group, and stand where it begins."""
    polled: dict[TopicPartition, Any] = {}
    while not polled:
        polled = consumer.poll(timeout_ms=500, max_records=1)
    consumer.seek_to_beginning()
    for where in consumer.assignment():
        consumer.position(where)


class Clock:
    """Seconds by the clock and of the processor, in this process and its children but the broker."""

    def __init__(self, broker: set[int]) -> None:
        self._process = psutil.Process()
        self._broker = broker
        self._began = time.perf_counter(), self._used()

    def _used(self) -> float:
        children = [one for one in self._process.children(recursive=True) if one.pid not in self._broker]
        times = [one.cpu_times() for one in (self._process, *children)]
        return sum(one.user + one.system for one in times)

    def read(self) -> Times:
        return time.perf_counter() - self._began[0], self._used() - self._began[1]


def loop(bootstrap: str, topic: str, count: int, classifier: Classifier, broker: set[int]) -> Times:
    """Time of the bare loop."""
    KafkaTCPTransport._sock_recv = AS_IT_COMES  # the exchange before has replaced it, see streams.kafka.transport
    group = uuid.uuid4().hex
    producer = KafkaProducer(bootstrap_servers=bootstrap, transactional_id=group, batch_size=2**17, retry_backoff_ms=20)
    producer.init_transactions()
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_bytes=FETCH_BYTES,
        max_partition_fetch_bytes=FETCH_BYTES,
        metrics_enabled=False,
    )
    begin(consumer)
    clock = Clock(broker)
    seen = 0
    while seen < count:
        polled = consumer.poll(timeout_ms=500, max_records=RECORDS)
        if not polled:
            continue
        messages = list(itertools.chain(*polled.values()))
        predictions: Sequence[Prediction] = classifier.classify([message.value for message in messages])
        producer.begin_transaction()
        sent = []
        for message, prediction in zip(messages, predictions, strict=True):
            answer = {"release": prediction.release, "labels": prediction.labels, "scores": prediction.scores}
            sent.append(producer.send(f"{topic}.out", json.dumps(answer).encode(), message.key))
        producer.flush()
        for one in sent:
            one.get(0)
        offsets = {where: OffsetAndMetadata(found[-1].offset + 1, "", -1) for where, found in polled.items()}
        producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
        producer.commit_transaction()
        seen += len(messages)
    times = clock.read()
    consumer.close()
    producer.close()
    return times


def exchange(bootstrap: str, topic: str, count: int, classifier: Classifier, broker: set[int], image: bytes) -> Times:
    """Time of the exchange and the responder, as `gapstream serve --kafka` has them."""
    codec = Codec(max_image_bytes=2**24, max_image_pixels=MAX_PIXELS, max_label_chars=200, labelled=False)
    ours = Exchange(
        Connection([bootstrap]), [topic], f"{topic}.out", codec, group=uuid.uuid4().hex, max_records=RECORDS,
        fetch_bytes=FETCH_BYTES,
    )  # fmt: skip
    decoders = Decoders(MAX_PIXELS)
    for _ in decoders.pixels([image] * 64, classifier.release.preprocess):  # starts the processes
        pass
    while not ours.take(0.5):
        pass
    ours.take_again()
    registry = CollectorRegistry()
    metrics = KafkaMetrics(registry, Reason)
    stop = threading.Event()
    responder = Responder(
        ours, lambda: classifier, metrics, stop.is_set, decoders,
        fetch=lambda claim: codec.fetch(claim, None),
    )  # fmt: skip
    answered = metrics.records.labels(topic)._value.get  # reading the whole registry again and again costs a lot
    clock = Clock(broker)
    responder.start()
    while answered() < count:
        time.sleep(0.005)
    times = clock.read()
    transactions = registry.get_sample_value("gapstream_serve_kafka_transactions_total", {"result": "committed"})
    print(f"    {count / (transactions or 1):.0f} messages a transaction", flush=True)
    stop.set()
    responder.join()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--photos", type=int, default=1500)
    parser.add_argument("--small", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=0, help="threads of onnxruntime, in both; 0: one for each core")
    options = parser.parse_args()
    kinds = {
        "500 x 400": (photo(), options.photos),
        "32 x 32": (encoded(picture(size=(32, 32)), "JPEG"), options.small),
    }
    good = True
    with tempfile.TemporaryDirectory() as folder:
        two_releases(load_clip(model("tinyclip")), Path(folder) / "state")
        classifier = Classifier(Path(folder) / "state", options.threads, device="cpu")
        broker = Broker(Path(folder) / "broker").start()
        try:
            pids = {child.pid for child in psutil.Process().children(recursive=True)}
            admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
            names = [f"t{number}{end}" for number in range(len(kinds)) for end in ("", ".out")]
            admin.create_topics(
                {name: {"num_partitions": PARTITIONS, "replication_factor": 1} for name in names},
                wait_for_metadata=True,
            )
            admin.close()
            for number, (kind, (image, count)) in enumerate(kinds.items()):
                fill(broker.bootstrap, f"t{number}", image, count)
                what = broker.bootstrap, f"t{number}", count, classifier, pids
                pairs = [(loop(*what), exchange(*what, image)) for _ in range(options.pairs + 1)][1:]
                for which, name in enumerate(("clock", "processor")):
                    ratios = [plain[which] / ours[which] for plain, ours in pairs]
                    plain_ms, our_ms = (
                        1000 * statistics.median(times[which] for times in side) / count
                        for side in zip(*pairs, strict=True)
                    )
                    print(
                        f"{kind}, by the {name}: loop {plain_ms:.2f} ms an image, exchange {our_ms:.2f} ms", flush=True
                    )
                    least = LEAST_RATIO if name == "clock" else None
                    good &= show(f"bare loop / serve --kafka, images of {kind}, by the {name}", ratios, least=least)
        finally:
            broker.kill()
    print(f"load {os.getloadavg()[0]:.0f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
