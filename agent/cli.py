"""The command `gapstream`: wires the parts, installs signals, picks the exit code. Nothing heavy is imported here.

Exit codes: 0 done, 1 stopped by an error, 2 wrong usage, 78 wrong configuration (RestartPreventExitStatus of systemd).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands_kafka import add_dlq, add_produce
from agent.config import Config, ConfigError, load, resolved, to_toml

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from agent.values import Commit
    from exporter.metrics import Metrics
    from streams.archive import ArchiveSource
    from streams.source import DeadLetters, Source

log = logging.getLogger(__name__)

EXIT_ERROR = 1
EXIT_CONFIG = 78
STALLED_S = 30
"""A loop that was silent for so long is not alive."""


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file; without one every key has its default")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one key, e.g. task.samples=1000; wins over file and environment; may be repeated",
    )


def _add_config_command(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--example", action="store_true", help="every key with its default, explained")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a release or state folder, instead of state.path")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="answers for each image (%(default)s)")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name never learned, scored beside the learned classes; may be repeated",
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--kafka", action="store_true", help="also answer the images of topics, see [serve.kafka]")


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")


def _add_produce(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add_produce(parser)


def _add_dlq(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add_dlq(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from agent.methods import METHODS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
A method may carry settings, each with a colon before it: `seca:sg_akt=false` sets method.seca.sg_akt in that row only,
a key with a dot is below [method]: `mgclip:epochs=2:lora.rank=4`. The same method with other settings is another row.
`joint` is the upper bound: finetune with all tasks as one. The stream is cut at the ends of its groups of classes.
Finished runs are kept in DIR/runs and not run again while all their settings stay the same."""
    add = parser.add_argument
    _add_config(parser)
    add("--data", metavar="PATH", help="folder or zip with train/class name/image and test/... (or val/...)")
    add("--methods", default=",".join([*METHODS, "joint"]), metavar="A,B:KEY=VALUE,...", help="(%(default)s)")
    add("--seeds", type=_numbers, default=(0,), metavar="N,N,...", help="of training; a run each (0)")
    add("--classes-per-task", type=int, metavar="N", help="(source.archive.classes_per_task, 2)")
    add("--tasks", type=int, default=0, metavar="N", help="only the first so many (all)")
    add("--order", metavar="SEED|FILE", help="of the classes: drawn with a seed, or a file (a name a line, or JSON)")
    add("--per-class", type=int, metavar="N", help="only the first so many training images of a class (all)")
    add("--probe", metavar="PATH", help="folder or zip of classes that are never learned, to measure retention on")
    add("--out", type=Path, default=Path("build/bench"), metavar="DIR", help="for the results (%(default)s)")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _add_rollback(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("number", type=int, nargs="?", metavar="N", help="a commit, see `gapstream releases`")
    which.add_argument("--newest", action="store_true", help="follow the newest release again")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str]] = {
    "run": ("learn a stream until it ends or SIGTERM comes", _add_config, "agent.cli:run_command"),
    "demo": ("learn the bundled stream and look at the result", _no_arguments, "agent.demo:demo_command"),
    "serve": (
        "classify over HTTP, or from topic to topic, with the newest release",
        _add_serve,
        "agent.cli:serve_command",
    ),
    "predict": ("classify images with the current release", _add_predict, "agent.cli:predict_command"),
    "report": ("write report.html from a state folder", _add_report, "agent.cli:report_command"),
    "releases": ("list the releases readers can be sent to", _add_config, "agent.releases:releases_command"),
    "rollback": (
        "send readers to an older release; the learner goes on",
        _add_rollback,
        "agent.releases:rollback_command",
    ),
    "produce": ("play an archive into a Kafka topic", _add_produce, "agent.commands_kafka:produce_command"),
    "dlq": ("list or replay the records that were set aside", _add_dlq, "agent.commands_kafka:dlq_command"),
    "doctor": (
        "look whether an agent can run, and say how to mend what is wrong",
        _add_config,
        "agent.doctor:doctor_command",
    ),
    "bench": ("compare methods on a stream of your own", _add_bench, "agent.bench:bench_command"),
    "config": ("print the configuration in force", _add_config_command, "agent.cli:config_command"),
}
"""Name -> (help, adds the arguments, "module:function"). The function takes the parsed arguments and returns the exit
code; its module is imported when the command is chosen. ConfigError becomes exit code 78, any other exception class of
this project one line and exit code 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Wrong usage raises SystemExit(2), as argparse does."""
    parser = argparse.ArgumentParser(prog="gapstream", description="Continual learning of CLIP on image streams.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add_arguments, function) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(function=function)
    chosen = parser.parse_args(arguments)
    module, _, attribute = chosen.function.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(chosen) or 0
    except ConfigError as error:
        print(f"gapstream: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone, as in `gapstream config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in ("agent", "exporter", "streams") and not isinstance(error, OSError):
            raise
        print(f"gapstream: {error}", file=sys.stderr)
        return EXIT_ERROR


def config_from(arguments: argparse.Namespace) -> Config:
    """The configuration of a command that has --config and --set. Raises ConfigError."""
    overrides = {}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, e.g. task.samples=1000")
        overrides[key] = value
    return load(arguments.config, os.environ, overrides)


def run_command(arguments: argparse.Namespace) -> None:
    config = config_from(arguments)
    log_to_stderr(config)
    stop = threading.Event()
    with stop_on_signals(stop):
        run_agent(config, stop)


def config_command(arguments: argparse.Namespace) -> None:
    config = Config() if arguments.example else config_from(arguments)
    print(to_toml(config, documented=arguments.example), end="")


def predict_command(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from exporter.preprocess import ImageError
    from exporter.runtime import Classifier

    classifier = Classifier(arguments.model or config_from(arguments).state.path)
    table = Table("image", "class", "score")
    failed = 0
    for path in arguments.images:
        try:
            (prediction,) = classifier.classify([path.read_bytes()], top=arguments.top, extra=arguments.name)
        except (ImageError, OSError) as error:
            print(f"gapstream: {path}: {error}", file=sys.stderr)
            failed = EXIT_ERROR
            continue
        for rank, (label, score) in enumerate(zip(prediction.labels, prediction.scores, strict=True)):
            table.add_row(Text("" if rank else str(path)), Text(label), f"{score:.1%}")
        table.add_section()
    Console().print(table)
    return failed


def serve_command(arguments: argparse.Namespace) -> None:
    from exporter.serve import Server

    config = config_from(arguments)
    log_to_stderr(config)
    limits = config.serve.model_dump(exclude={"kafka"})
    limits |= {"max_pixels": config.source.max_image_pixels, "max_name_chars": config.source.max_label_chars}
    server = Server(config.state.path, **limits)
    log.info("answering on http://%s:%d/v1/classify", config.serve.host, server.port)
    stop = threading.Event()
    with stop_on_signals(stop), contextlib.ExitStack() as parts:
        if arguments.kafka:
            from agent.serve_kafka import beside

            parts.enter_context(beside(config, server))
        if not stop.is_set():
            server.run()


def report_command(arguments: argparse.Namespace) -> None:
    from agent.report import write_report

    write_report(config_from(arguments).state.path, arguments.out)
    print(f"wrote {arguments.out}")


def run_agent(
    config: Config,
    stop: threading.Event,
    make_metrics: Callable[[CollectorRegistry], Metrics] | None = None,
    learner: str | None = None,
) -> Commit | None:
    """Run an agent until its stream ends or `stop` is set; returns its last commit.

    `make_metrics` builds what is told of everything that happens (exporter.metrics.Metrics by default, a subclass to
    watch), `learner` names the class that learns (agent.trainer:Learner by default). Raises StreamError, StateError,
    AgentError, and OSError when the HTTP address cannot be had.
    """
    from prometheus_client import CollectorRegistry

    from agent.commits import CommitStore
    from agent.notify import supervised
    from agent.pipeline import Pipeline, Rules, resume
    from agent.releases import pinned
    from agent.worker import TRAINER, ProcessWorker
    from exporter.http import StatusServer
    from exporter.metrics import Metrics
    from streams.buffer import CutRule, TaskBuffer
    from streams.spool import Spool

    registry = CollectorRegistry()
    metrics = (make_metrics or Metrics)(registry)
    metrics.readers(lambda: pinned(config.state.path))
    with contextlib.ExitStack() as parts:
        commits = CommitStore(config.state.path, config.state.keep_commits)
        parts.callback(commits.close)
        commits.lock()
        source, dead_letters = open_stream(config)
        parts.callback(source.close)
        parts.callback(dead_letters.close)
        commit = resume(commits, source)
        if commit is not None:
            log.info("continuing from commit %06d: %d classes learned", commit.number, len(commit.classes))
            metrics.restored(commit)
        spool = Spool(config.state.path / "spool", config.spool.max_bytes)
        rule = CutRule(**config.task.model_dump(exclude={"on_stop"}))
        known, done = (commit.seen, commit.tasks) if commit else ((), 0)
        worker = ProcessWorker(config, learner or TRAINER)
        published = _publisher(config, commit, parts)
        pipeline = Pipeline(
            source=source,
            buffer=TaskBuffer(rule, spool, known, done + 1, source.positions),
            spool=spool,
            worker=worker,
            commits=commits,
            dead_letters=dead_letters,
            metrics=metrics,
            stop=stop,
            rules=Rules(
                poll_timeout_s=config.agent.poll_timeout_s,
                learn_at_end=config.source.archive.on_end == "learn",
                learn_at_stop=config.task.on_stop == "learn",
                quarantine=config.agent.on_task_failure == "quarantine",
                stop_timeout_s=config.agent.stop_timeout_s,
            ),
            config=resolved(config),
            commit=commit,
            published=published,
        )
        if config.http.enabled:
            server = StatusServer(
                config.http.host,
                config.http.port,
                registry,
                live=lambda: _why_not_alive(metrics.status()),
                ready=lambda: _why_not_ready(worker.ready, pipeline.commit),
                status=metrics.status,
                heartbeat=metrics.heartbeat,
                pictures=metrics.pictures,
            )
            parts.callback(server.stop)
            server.start()
            log.info("metrics and status page on http://%s:%d/", config.http.host, server.port)
        parts.enter_context(
            supervised(
                live=lambda: _why_not_alive(metrics.status()),
                ready=lambda: worker.ready,
                doing=lambda: _doing(metrics.status()),
                stop=stop,
            )
        )
        return pipeline.run()


def _publisher(config: Config, commit: Commit | None, parts: contextlib.ExitStack) -> Callable[[Commit], None]:
    """What takes each release where `release.layout` wants it, beside the state folder; begins with that of `commit`,
    which may have been left out when the agent was killed."""
    if config.release.layout == "folder":
        return lambda commit: None
    from agent.releases import Publisher

    publisher = Publisher(config.release, config.state.path)
    parts.callback(publisher.close)
    if commit is not None and commit.release is not None:
        publisher(commit)
    return publisher


def open_stream(config: Config) -> tuple[Source, DeadLetters]:
    """The configured source, and where its rejected records go. Raises StreamError."""
    if config.source.kind == "kafka":
        from agent.commands_kafka import open_kafka

        return open_kafka(config)
    from streams.dead_letters import FileDeadLetters

    return open_archive(config), FileDeadLetters(config.state.path / "dead_letters", config.state.dead_letter_bytes)


def open_archive(config: Config) -> ArchiveSource:
    """Raises ArchiveError."""
    from streams.archive import ArchiveSource

    limits = config.source.model_dump(include={"max_image_bytes", "max_image_pixels", "max_label_chars"})
    return ArchiveSource(**config.source.archive.model_dump(exclude={"on_end"}), **limits)


def log_to_stderr(config: Config) -> None:
    from agent.worker import LOG_FORMAT

    logging.basicConfig(level=config.agent.log_level, format=LOG_FORMAT)
    if config.agent.log_level != "DEBUG":
        # The client has lines for every connection and attempt; streams.kafka says what came of them.
        for handler in logging.getLogger().handlers:
            handler.addFilter(lambda record: not record.name.startswith("kafka."))


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; a second one ends the process at once, which loses nothing either."""

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why_not_alive(status: dict[str, Any]) -> list[str]:
    seen = {"pipeline": status["started"]} | status["heartbeats"]
    return [
        f"the {loop} loop was last seen {status['now'] - last:.0f} s ago, expected every few seconds"
        for loop, last in seen.items()
        if status["now"] - last > STALLED_S
    ]


def _doing(status: dict[str, Any]) -> str:
    commit = status["commit"]
    return f"{status['state']}; " + (f"{commit['classes']} classes learned" if commit else "nothing learned yet")


def _why_not_ready(trainer_ready: bool, commit: Commit | None) -> list[str]:
    reasons = [] if trainer_ready else ["the trainer is being set up"]
    if commit is None or commit.release is None:
        reasons.append("nothing is released yet; the first release comes with the first learned task")
    return reasons
