"""A real Apache Kafka broker for tests: one KRaft node from the official jars, on free ports, in its own folder.

The jars come from Maven Central once and are cached (`build/kafka`, or `$XDG_CACHE_HOME/gapstream/kafka`). Two
listeners: PLAINTEXT, and SASL_SSL with PLAIN, SCRAM-SHA-512 and OAUTHBEARER under a certificate made on the spot.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import ClassVar

import pytest

from tests.processes import free_port

KAFKA_VERSION = "4.3.1"
LOG4J_VERSION = "2.25.1"
USER, PASSWORD = "gapstream", "p4ss-word"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>gapstream</groupId><artifactId>broker</artifactId><version>1</version><dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version></dependency>
<dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
<version>{LOG4J_VERSION}</version></dependency>
<dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId><version>{LOG4J_VERSION}</version></dependency>
</dependencies></project>
"""

_LOG4J = """<Configuration status="warn"><Appenders>
<Console name="out"><PatternLayout pattern="%d %p %m (%c{1})%n%throwable"/></Console></Appenders>
<Loggers><Root level="warn"><AppenderRef ref="out"/></Root></Loggers></Configuration>
"""

_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
_OAUTH = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required"
_OAUTH_HANDLER = (
    "org.apache.kafka.common.security.oauthbearer.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"
)


class BrokerUnavailable(Exception):
    """No broker can be started here; the message says what is missing and how to get it."""


def jars() -> Path:
    """Folder with Kafka's jars, fetched on first use. Raises BrokerUnavailable."""
    if not shutil.which("java") or not shutil.which("mvn"):
        raise BrokerUnavailable(
            "Kafka tests need Java 17 and mvn (Debian: apt-get install openjdk-17-jre-headless maven), "
            "or KAFKA_BOOTSTRAP_SERVERS=host:port of a running cluster"
        )
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) / "gapstream/kafka" if cache else Path(__file__).parents[2] / "build/kafka"
    folder = root / KAFKA_VERSION
    if folder.exists():
        return folder
    staging = root / f"{KAFKA_VERSION}.{os.getpid()}"
    staging.mkdir(parents=True)
    (staging / "pom.xml").write_text(_POM)
    fetched = subprocess.run(
        ["mvn", "-B", "-q", "-f", staging / "pom.xml", "dependency:copy-dependencies", f"-DoutputDirectory={staging}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if fetched.returncode:
        shutil.rmtree(staging)
        raise BrokerUnavailable(
            f"mvn could not fetch Kafka {KAFKA_VERSION}:\n{fetched.stdout[-2000:]}{fetched.stderr[-2000:]}"
        )
    staging.rename(folder)
    return folder


class Broker:
    """One node. `start`, `stop` (clean), `kill` (SIGKILL) and `start` again on the same data and ports."""

    _formatted: ClassVar[Path | None] = None
    """What the first one of this process began with: the others begin with a copy, which needs no Java."""

    def __init__(self, folder: Path, **overrides: str) -> None:
        """`overrides`: server properties with `_` for `.`."""
        self._folder = folder
        self._libs = jars()
        self._process: subprocess.Popen[bytes] | None = None
        ports = [free_port() for _ in range(3)]
        self.bootstrap = f"127.0.0.1:{ports[0]}"
        self.secure_bootstrap = f"localhost:{ports[1]}"
        self.cafile = folder / "ca.pem"
        folder.mkdir(parents=True, exist_ok=True)
        self._certificate()
        secure = "listener.name.sasl_ssl"
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{ports[2]}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://127.0.0.1:{ports[0]},SASL_SSL://localhost:{ports[1]},CONTROLLER://127.0.0.1:{ports[2]}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports[0]},SASL_SSL://localhost:{ports[1]}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL",
            "inter.broker.listener.name": "PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512,OAUTHBEARER",
            f"{secure}.plain.sasl.jaas.config": f'{_PLAIN} user_{USER}="{PASSWORD}";',
            f"{secure}.scram-sha-512.sasl.jaas.config": _SCRAM,
            f"{secure}.oauthbearer.sasl.jaas.config": f'{_OAUTH} unsecuredLoginStringClaim_sub="{USER}";',
            f"{secure}.oauthbearer.sasl.server.callback.handler.class": _OAUTH_HANDLER,
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(folder / "server.pem"),
            "log.dirs": str(folder / "data"),
            "num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "log.cleaner.enable": "false",
            "log.retention.check.interval.ms": "1000",
            "log.segment.delete.delay.ms": "0",
            "log.initial.task.delay.ms": "500",
            "message.max.bytes": str(4 * 2**20),
            "auto.create.topics.enable": "false",
            "num.network.threads": "2",
            "num.io.threads": "2",
            "broker.session.timeout.ms": "2000",
            "broker.heartbeat.interval.ms": "500",
        } | {key.replace("_", "."): value for key, value in overrides.items()}
        self._properties = folder / "server.properties"
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        (folder / "log4j2.xml").write_text(_LOG4J)
        self._format(folder / "data")

    def _format(self, data: Path) -> None:
        if Broker._formatted is not None:
            shutil.copytree(Broker._formatted, data)
            return
        cluster = base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")
        if cluster.startswith("-"):
            cluster = "A" + cluster[1:]
        scram = f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"
        self._run_tool("format", "-t", cluster, "-c", str(self._properties), "-S", scram)
        Broker._formatted = shutil.copytree(data, self._folder / "formatted")

    def _java(self, *args: str) -> list[str]:
        return [
            "java", "-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData",
            f"-Dlog4j2.configurationFile={self._folder / 'log4j2.xml'}", "-cp", f"{self._libs}/*", *args,
        ]  # fmt: skip

    def _run_tool(self, *args: str) -> None:
        done = subprocess.run(self._java("kafka.tools.StorageTool", *args), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise BrokerUnavailable(
                f"Kafka's storage could not be formatted:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )

    def _certificate(self) -> None:
        def openssl(*args: str) -> None:
            subprocess.run(["openssl", *args], cwd=self._folder, check=True, capture_output=True)

        key = ("-newkey", "rsa:2048", "-nodes")
        openssl(
            "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=gapstream test CA"
        )
        openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
        (self._folder / "san.cnf").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-out", "server.crt", "-days", "2", "-extfile", "san.cnf")  # fmt: skip
        pem = "".join((self._folder / name).read_text() for name in ("server.key", "server.crt", "ca.pem"))
        (self._folder / "server.pem").write_text(pem)

    def start(self, timeout_s: float = 90) -> Broker:
        log = (self._folder / "broker.log").open("ab")
        self._process = subprocess.Popen(self._java("kafka.Kafka", str(self._properties)), stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + timeout_s
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = (self._folder / "broker.log").read_text(errors="replace")[-3000:]
                raise BrokerUnavailable(f"Kafka did not start within {timeout_s:.0f} s:\n{tail}")
            time.sleep(0.2)
        return self

    def _ready(self) -> bool:
        host, port = self.bootstrap.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def start_broker(folder: Path, start: bool = True) -> Broker:
    """A broker, started or to be started; skips the test where none can be had, unless CI is set."""
    try:
        broker = Broker(folder)
        return broker.start() if start else broker
    except BrokerUnavailable as why:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(why))
