"""Kills agents, trainers and servers in the middle of their work, and looks at what they end with.

`python -m tests.monkey.kills --count 1000 --seed 7` deals a thousand blows, most of them into export and commit.

Each episode is a state folder whose agents are struck (tests/monkey/blows.py) until one gets to the end of the stream.
What it ends with must be what an undisturbed agent ends with, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.runtime import Classifier
from tests.monkey.blows import HOWS, PHASES, Blow, Life, image, live, measured, prepare, spied_upon, tally
from tests.monkey.faults import damage
from tests.monkey.images import mutants, seeds
from tests.monkey.runs import Failed, Run
from tests.processes import free_port, gapstream, get

TASKS, CLASSES_PER_TASK, IMAGES_PER_CLASS = 5, 2, 8


def archive(folder: Path) -> Path:
    """Images of a few tasks; some are rejected at intake, some by the trainer."""
    for number in range(TASKS * CLASSES_PER_TASK):
        name = f"class {number}"
        (folder / name).mkdir(parents=True)
        for index in range(IMAGES_PER_CLASS):
            (folder / name / f"{index}.png").write_bytes(image(name, index))
        (folder / name / "late.png").write_bytes(image(name, 99)[:200])
        (folder / name / "none.png").write_bytes(b"no image")
    return folder


@dataclass(frozen=True)
class End:
    """What an agent leaves at the end of its stream, as far as it must not depend on what happened on the way."""

    learner: str
    files: Mapping[str, str]
    """Those of the last commit with their hashes, but for what has a time in it."""
    offsets: str
    totals: Mapping[str, float]
    letters: frozenset[tuple[int, int, str]]
    answers: str
    tree: tuple[str, ...]
    """Every name in the state folder."""

    @classmethod
    def of(cls, state: Path, answers: str, letters: frozenset[tuple[int, int, str]]) -> End:
        manifest = json.loads((state / "CURRENT/manifest.json").read_text())
        timed = ("report.json", "release/release.json", "release/golden.npz", "learner.safetensors")
        return cls(
            learner=hashlib.sha256((state / "CURRENT/learner.safetensors").read_bytes()).hexdigest(),
            files={name: digest for name, (_, digest) in manifest["files"].items() if name not in timed},
            offsets=str(manifest["offsets"]),
            totals={name: total for name, total in manifest["totals"].items() if not name.startswith("rejected_")},
            letters=letters,
            answers=answers,
            tree=tuple(sorted(str(path.relative_to(state)) for path in state.rglob("*") if "dead_" not in str(path))),
        )


def answers(release: Path) -> str:
    """What a release answers to an image; asked in a process of its own, as onnxruntime must not be forked."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            [found] = Classifier(release.resolve(), threads=1).classify([image("question", 0)])
            os.write(writing, json.dumps([found.labels, np.array(found.scores).round(5).tolist()]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return told


class Serving:
    """`gapstream serve` on a state folder: killed and started again, and asked."""

    def __init__(self, state: Path, log: Path, known: Sequence[str], chance: random.Random) -> None:
        self._state, self._log, self._known, self._chance = state, log, known, chance
        self._images = seeds()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._port = free_port()
        command = gapstream("serve", state__path=self._state, serve__port=self._port, serve__threads=1)
        with self._log.open("ab") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said)

    def answer(self) -> str:
        """What it answers, '' where it has no answer yet. Raises Failed for an answer of no release."""
        for _ in range(3):  # whatever these become
            get(f"http://127.0.0.1:{self._port}/v1/classify", mutants(self._chance, self._images)[1])
        found = get(f"http://127.0.0.1:{self._port}/v1/classify?top=5", image("question", 0))
        if not found or "predictions" not in found:
            return ""
        [one] = found["predictions"]
        told = json.dumps([one["labels"], np.array(one["scores"]).round(5).tolist()])
        if told not in self._known:
            raise Failed(f"the server answered {told}, which no release does: {self._known}")
        return told

    def signal(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        self.process = None


class Monkey:
    """The undisturbed run of a method on an archive, and episodes of blows that must end like it."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder = folder
        self.method = method
        self.log = folder / "log"
        self.lost = self.twice = 0
        prepare(folder / "prepared", method)
        self.stream = self.prepare_stream(archive(folder / "archive"))
        spied_upon()
        state = folder / "undisturbed"
        life = live(self.settings(state), self.log, enough=lambda: self.ended(state))
        if life.status:
            raise Failed(f"the undisturbed run ended with {life.status}\n{self.log.read_text()[-3000:]}")
        self.steps, self.seconds = measured(life)
        releases = [commit / "release" for commit in sorted((state / "commits").iterdir())]
        self.known = [answers(release) for release in releases if release.exists()]
        self.expected = End.of(state, self.known[-1], self.letters(state))

    def prepare_stream(self, images: Path) -> dict[str, object]:
        """Makes the stream that all learn; gives the settings of its source."""
        return {"source.archive.path": images, "source.archive.classes_per_task": CLASSES_PER_TASK}

    def ended(self, state: Path) -> bool:
        """Whether an agent that does not end by itself has learned all there is."""
        return False

    def letters(self, state: Path) -> frozenset[tuple[int, int, str]]:
        """Partition, offset and reason of every dead letter."""
        lines = [line for file in sorted((state / "dead_letters").iterdir()) for line in file.open()]
        return frozenset((one["partition"], one["offset"], one["reason"]) for one in map(json.loads, lines))

    def close(self) -> None:
        """Lets go of what the stream needs."""

    def disturb_stream(self, chance: random.Random) -> Counter[str]:
        """Does something to where the records come from."""
        return Counter()

    def settings(self, state: Path) -> dict[str, object]:
        return self.stream | {
            "state.path": state,
            "method.name": self.method,
            "evaluation.holdout_fraction": 0.2,
            "release.max_batch": 4,
            "model.threads": 1,
            "http.enabled": "false",
            "state.keep_commits": 2 * TASKS,
        }

    def blow(self, chance: random.Random, who: str) -> Blow:
        places = {place: weight for place, weight in PHASES.items() if place[0] == who}
        [(_, phase)] = chance.choices(list(places), list(places.values()))
        [how] = chance.choices(list(HOWS), list(HOWS.values()))
        timed = how not in errno.__dict__ and chance.random() < 0.3
        step = 0 if timed else chance.randint(1, max(1, chance.choice(self.steps[who, phase])))
        delay_s = chance.uniform(0, chance.choice(self.seconds[who, phase]))
        return Blow(who, phase, chance.choice((0, 0, 0, 1)), step, delay_s if timed else chance.uniform(0.01, 0.3), how)

    def episode(self, number: int, chance: random.Random, blows: int) -> Counter[str]:
        """Deals about `blows` blows to the agents of one state folder, and lets the last one end. Raises Failed."""
        state, log = self.folder / f"{number}" / "state", self.folder / f"{number}" / "log"
        temporary = self.folder / f"{number}" / "tmp"
        temporary.mkdir(parents=True)
        settings = self.settings(state)
        done: Counter[str] = Counter()
        damaged = ""
        with contextlib.ExitStack() as stack:
            serving = Serving(state, log, self.known, chance)
            stack.callback(serving.kill)
            serves = chance.random() < 0.1
            os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
            while True:
                last = sum(done.values()) >= blows
                aims = [] if last else [self.blow(chance, "trainer") for _ in range(chance.choice((0, 1, 1, 2)))]
                hit = None if last else self.blow(chance, "agent")
                life = live(settings, log, hit, aims, lambda: self.ended(state))
                done += tally(life)
                self.judge(life, hit, aims, log)
                if serves:
                    done += self.disturb(serving, chance)
                if not life.status:
                    break
                done += self.disturb_stream(chance)
                if not damaged and chance.random() < 0.1 and len(list((state / "commits").glob("0?????"))) > 1:
                    damaged = damage(state, chance)
                    done["damaged file"] += 1
            if serves and serving.process and not damaged:
                deadline = time.monotonic() + 60
                while serving.answer() != self.expected.answers:
                    if time.monotonic() > deadline:
                        raise Failed(f"the server does not answer like the last release\n{log.read_text()[-3000:]}")
                    time.sleep(0.2)
        end = End.of(state, answers(state / "RELEASE"), self.letters(state))
        difference = int(end.totals["records"] - self.expected.totals["records"])
        self.lost, self.twice = self.lost + max(0, -difference), self.twice + max(0, difference)
        left = sorted(path.name for path in temporary.iterdir())
        if end != self.expected and not (damaged and same_but_for_damage(end, self.expected)):
            differing = [name for name in vars(end) if getattr(end, name) != getattr(self.expected, name)]
            told = "\n".join(f"{n}: {getattr(end, n)}\nexpected {getattr(self.expected, n)}" for n in differing)
            raise Failed(f"{difference:+d} records; damaged: {damaged or 'nothing'}; {told}\n{log.read_text()[-6000:]}")
        if left:
            raise Failed(f"temporary files were left: {left}")
        shutil.rmtree(self.folder / f"{number}")
        return done

    def judge(self, life: Life, hit: Blow | None, aims: Sequence[Blow], log: Path) -> None:
        """An agent ends with 0, killed by us, or with 1 and a message where the disk or two trainers failed."""
        code = os.waitstatus_to_exitcode(life.status)
        excused = life.count("fault") or life.count("killed") > 1
        if code not in (0, -signal.SIGKILL) and not (code == 1 and excused):
            said = log.read_text()[-4000:]
            raise Failed(f"an agent ended with {code} after {hit} and {aims}, events {life.events[-5:]}\n{said}")
        if code == 1 and "gapstream: " not in log.read_text()[-3000:]:
            raise Failed(f"an agent ended with 1 and no message\n{log.read_text()[-3000:]}")

    def disturb(self, serving: Serving, chance: random.Random) -> Counter[str]:
        """Starts the server, kills it, holds it up, or asks it."""
        if serving.process is None:
            serving.start()
        elif serving.process.poll() is not None:
            raise Failed(f"the server ended by itself with {serving.process.returncode}")
        elif chance.random() < 0.2:
            serving.kill()
            return Counter({"serve kill": 1})
        elif chance.random() < 0.2:
            serving.signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.01, 0.2))
            serving.signal(signal.SIGCONT)
            return Counter({"serve stop": 1})
        else:
            serving.answer()
        return Counter()


def same_but_for_damage(end: End, expected: End) -> bool:
    """Damage may cost what only scoring and readers need, and leaves the damaged commit in the folder; no sample."""
    return (end.learner, end.offsets, end.totals) == (expected.learner, expected.offsets, expected.totals)


def main(run: Run, kind: type[Monkey] = Monkey) -> None:
    dealt: Counter[str] = Counter()
    method = ("gapstream", "ncm")[run.seed % 2]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        monkey = kind(Path(folder), method)
        stack.callback(monkey.close)
        number = run.first
        while (done := sum(dealt.values())) < run.count:
            with run.case(number) as chance:
                dealt += monkey.episode(number, chance, min(chance.randint(3, 30), run.count - done))
            number += 1
            run.done(sum(dealt.values()))
    told = dict(sorted(dealt.items()))
    run.figures(
        method=method,
        blows=sum(dealt.values()),
        episodes=number - run.first,
        lost=monkey.lost,
        twice=monkey.twice,
        **told,
    )


if __name__ == "__main__":
    Run("kills", 30).watched(main)
