"""The agent's intake from Kafka (poll, decode, check, spool) against a bare kafka-python poll loop on the same topic;
and the agent's memory while it works through 2 GB.

    .venv/bin/python -m tests.bench.bench_intake [--records-mb 100] [--waiting-mb 2000] [--pairs 7]

Starts a broker of its own. The two are run in turns; of each pair the ratio of their times counts, by the clock and in
seconds of the processor, which tell more on a machine that others use too. Fails when the intake is below 0.6 of the
bare loop by the clock, or the agent above 400 MB.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.net.transport import KafkaTCPTransport

from streams.buffer import CutRule, TaskBuffer
from streams.formats import Codec
from streams.kafka.connection import Connection
from streams.kafka.source import KafkaSource
from streams.spool import Spool
from tests.bad_images import encoded, picture
from tests.kafka.agents import Agent, current, wait_until
from tests.kafka.broker import Broker

SIZES = (1_000, 20_000, 200_000)
LEAST_RATIO = 0.6
MOST_MB = 400
AS_IT_COMES = KafkaTCPTransport._sock_recv
JPEG = encoded(picture(size=(16, 16)), "JPEG")


def fill(bootstrap: str, topic: str, size: int, count: int) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=20, batch_size=2**18, max_request_size=2**22)
    image = JPEG + bytes(size - len(JPEG))
    for number in range(count):
        producer.send(topic, image, b"%d" % number, [("label", b"cat"), ("content-type", b"image/jpeg")])
        if number % 2000 == 0:
            producer.flush()
    producer.flush()
    producer.close()


Times = tuple[float, float]
"""Seconds by the clock, and of the processor in all threads of this process."""


def timed(work: Callable[[], None]) -> Times:
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def bare(bootstrap: str, topic: str, count: int) -> Times:
    """Time of a loop that polls with the client's defaults and does nothing."""
    KafkaTCPTransport._sock_recv = AS_IT_COMES  # the intake before has replaced it, see streams.kafka.transport
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    where = TopicPartition(topic, 0)
    consumer.assign([where])
    consumer.seek(where, 0)

    def work() -> None:
        seen = 0
        while seen < count:
            seen += sum(map(len, consumer.poll(timeout_ms=1000).values()))

    times = timed(work)
    consumer.close()
    return times


def intake(bootstrap: str, topic: str, count: int, folder: Path) -> Times:
    """Time of the source, the codec and the spool, as the agent has them."""
    codec = Codec(max_image_bytes=2**24, max_image_pixels=50_000_000, max_label_chars=200)
    source = KafkaSource(Connection([bootstrap]), [topic], codec, group="")
    spool = Spool(folder, 2**40)
    buffer = TaskBuffer(CutRule(), spool, (), 1, {})

    def work() -> None:
        source.seek({})
        seen = 0
        while seen < count:
            items = source.poll(1)
            for item in items:
                buffer.add(item)
            seen += len(items)

    gc.collect()
    gc.freeze()  # as agent/run.py does
    times = timed(work)
    gc.unfreeze()
    source.close()
    if task := buffer.end("stop"):
        buffer.committed(task)
    return times


def peak_mb(bootstrap: str, topic: str, count: int, state: Path) -> float:
    """Largest resident memory of an agent process that learns `count` records of 200 kB, faster read than learned."""
    rules = {"task__samples": 0, "task__bytes": 64 * 2**20, "spool__max_bytes": 256 * 2**20}
    with Agent(state, bootstrap, [topic], **rules) as agent:
        wait_until(lambda: (commit := current(state)) and sum(commit.offsets.values()) > count - 500, 500)
        lines = Path(f"/proc/{agent.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records-mb", type=int, default=100)
    parser.add_argument("--waiting-mb", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(Path(folder) / "broker").start()
        try:
            admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
            topics = {f"s{size}": {"num_partitions": 1, "replication_factor": 1} for size in (*SIZES, 0)}
            admin.create_topics(topics, wait_for_metadata=True)
            admin.close()
            for size in SIZES:
                count = arguments.records_mb * 1_000_000 // size
                fill(broker.bootstrap, f"s{size}", size, count)
                pairs = [
                    (
                        bare(broker.bootstrap, f"s{size}", count),
                        intake(broker.bootstrap, f"s{size}", count, Path(folder, "s")),
                    )
                    for _ in range(arguments.pairs + 1)
                ][1:]
                print(f"{size:7} B: bare loop {count / statistics.median(plain for (plain, _), _ in pairs):.0f}/s")
                for which, name in enumerate(("clock", "processor")):
                    ratios = [plain[which] / ours[which] for plain, ours in pairs]
                    ratio = results[f"ratio_{size}_{name}"] = statistics.median(ratios)
                    print(f"    by the {name}: {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the bare loop")
            fill(broker.bootstrap, "s0", 200_000, arguments.waiting_mb * 5)
            results["peak_mb"] = peak_mb(broker.bootstrap, "s0", arguments.waiting_mb * 5, Path(folder) / "state")
            print(f"agent's peak memory with {arguments.waiting_mb} MB waiting: {results['peak_mb']:.0f} MB")
        finally:
            broker.kill()
    print(json.dumps(results))
    slow = any(results[f"ratio_{size}_clock"] < LEAST_RATIO for size in SIZES)
    return 1 if slow or results["peak_mb"] > MOST_MB else 0


if __name__ == "__main__":
    sys.exit(main())
