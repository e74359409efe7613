"""The trainer of a site of a fleet: it learns its own stream, and answers with what all sites learned.

What is saved, and gone on from, is this site's learner alone. What is scored and released is a second learner, made of
this one and the newest states of the other sites, which agent/fleet.py keeps in the state folder. A state that cannot
be added is left out and named in the report; where none can, or adding fails, this site answers alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from agent import methods
from agent.config import Config
from agent.fleet_states import Shared, SharedRefused, check, facts
from agent.layout import FLEET, MEMBER, SHARED
from agent.methods.base import NOTHING, Counted, InferenceModule, LearnerState, TaskData
from agent.methods.gapstream import Gapstream
from agent.methods.merging import MergeError
from agent.methods.publishing import SiteLearner, incoming
from agent.model.images import StoredTokens
from agent.scoring.anew import of_same_task, reopened
from agent.scoring.holdout import EncodedImage
from agent.scoring.report import Fleet, Report, Site
from agent.trainer import Trainer, last_report, parent_of
from agent.values import OnProgress, Outcome, Update
from exporter.release import digest
from streams.blobs import Blob, kept
from streams.buffer import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Other:
    """Another site's state that may be added."""

    shared: Shared
    state: LearnerState


class FleetTrainer(Trainer):
    """Learns task after task, and answers with the fleet. A task without samples is scored and released anew."""

    def __init__(self, config: Config, commit: Path | None) -> None:
        """Continue as Trainer does; what it raises."""
        super().__init__(config, commit)
        self._folder = config.state.path / FLEET
        self._fleet = Fleet(site=config.fleet.site)
        self._learner = SiteLearner(self._method, config.fleet.min_images)
        if commit is not None and (commit / MEMBER).exists():
            known = load_file(commit / MEMBER)
            self._learner.fusion = known.get("fusion")
            width = self._clip.embed_dim if isinstance(self._method, Gapstream) else 0
            self._learner.held = _loaded(known, "", self._method.classes, width)
            self._learner.last = _loaded(known, "last.", self._method.classes, width)
            self._learner.task = int(known.get("last.task", 0))
        self._roots = last.roots if (last := last_report(commit)) else set()
        self._read: dict[str, tuple[Blob, _Other | str]] = {}
        """Site -> the blob that was read last, and what came of it: its state, or why there is none."""
        self._take_up()

    def learn(self, task: Task, staging: Path, on_progress: OnProgress) -> Outcome:
        if task.samples:
            return super().learn(task, staging, on_progress)
        parent = parent_of(staging)
        if parent is not None:
            self._holdout.moved(parent)
        last = last_report(parent)
        again = last if last is not None and last.history and last.history[-1].task == task.number else None
        nothing = TaskData(
            task.number, (), torch.zeros(0, dtype=torch.int64), StoredTokens(torch.empty(0), self._clip.device)
        )
        before = self._evaluator.before(self._answers, self._module, nothing, on_progress)
        self._take_up()
        report = self._evaluator.after(
            self._answers, self._module, nothing, None, before, reopened(again) if again else last, on_progress
        )
        if again:
            report = of_same_task(report, again)
        outcome = self._complete(report, self._holdout.images(), staging, parent, {}, on_progress)
        return replace(outcome, next_offsets=task.next_offsets)

    def _update(self, data: TaskData, on_progress: OnProgress) -> Update | None:
        update = super()._update(data, on_progress)
        if update is not None:
            self._learner.learned(data)
        return update

    def _take_up(self) -> None:
        """Answer with what this site and the others have learned by now."""
        found = self._others(self._learner.own())
        others = {site: other.state for site, (_, other) in found.items() if isinstance(other, _Other)}
        failed = ""
        try:
            answers = self._learner.answers(lambda: methods.build(self._clip, self._config.method), others)
            self._module = _finite(answers.inference_module()) if answers.classes else None
            self._answers = answers
        # Whatever peers sent, and however little memory there is for it: this site answers on.
        except (MergeError, ArithmeticError, ValueError, LookupError, RuntimeError, MemoryError) as error:
            log.exception("what the other sites learned cannot be added; this site answers alone")
            failed = f"adding failed: {type(error).__name__}: {str(error)[:200]}"
            self._answers = self._method
            self._module = self._method.inference_module() if self._method.classes else None
        self._fleet = Fleet(site=self._fleet.site, sites=tuple(_told(*found[site], failed) for site in sorted(found)))

    def _others(self, own: LearnerState) -> dict[str, tuple[Blob, _Other | str]]:
        """Read the states of the other sites that were not read before, and judge each beside those accepted so far, in
        the order of their names, so that all sites come to the same end."""
        roots = dict.fromkeys(self._roots, self._fleet.site)
        read: dict[str, tuple[Blob, _Other | str]] = {}
        judged: dict[str, tuple[Blob, _Other | str]] = {}
        for site, (blob, path) in sorted(kept(self._folder).items()):
            before = self._read.get(site)
            known = before is not None and before[0] == blob
            blob, result = before if before is not None and known else self._opened(own, site, blob, path)
            read[site] = blob, result
            if isinstance(result, _Other):
                shared = [roots[root] for root in sorted(result.shared.roots) if root in roots]
                roots |= dict.fromkeys(result.shared.roots, site)
                if shared:
                    result = (
                        f"{shared[0]} and {site} cannot be merged: both went on from one learner, whose images would "
                        "count twice"
                    )
            judged[site] = blob, result
            if isinstance(result, str) and not known:
                log.error("%s", result)
        self._read = read
        return judged

    def _opened(self, own: LearnerState, site: str, blob: Blob, path: Path) -> tuple[Blob, _Other | str]:
        """Read a site's state, or the one that takes its place meanwhile; a text says why it cannot be added."""
        while True:
            result = self._judged(own, site, blob, path)
            newer = None if path.exists() else kept(self._folder).get(site)
            if not isinstance(result, str) or newer is None or newer[0] == blob:
                return blob, result
            blob, path = newer

    def _judged(self, own: LearnerState, site: str, blob: Blob, path: Path) -> _Other | str:
        here = self._fleet.site
        try:
            if digest(path)[1] != blob.sha256:
                raise SharedRefused("its file is damaged; it comes again with its next commit or at the next start")
            shared = check(path)
            mine = self._learned_under()
            one = mine["method"], mine["model"]["sha256"], mine["model"]["prompt"]
            other = shared.method, shared.model["sha256"], shared.model["prompt"]
            if one != other:
                raise MergeError(f"the one was learned by {_words(*one)}, the other by {_words(*other)}")
            return _Other(shared, incoming(own, load_file(path), list(shared.classes), shared.depth, shared.fitted))
        except SharedRefused as error:
            return f"what {site} published is not used: {error}"
        except (MergeError, RuntimeError) as error:
            return f"{here} and {site} cannot be merged: {error}"
        except OSError as error:
            return f"what {site} published cannot be read: {error.strerror or error}"

    def _complete(
        self,
        report: Report,
        held: Sequence[EncodedImage],
        staging: Path,
        parent: Path | None,
        seconds: Mapping[str, float],
        on_progress: OnProgress,
    ) -> Outcome:
        return super()._complete(replace(report, fleet=self._fleet), held, staging, parent, seconds, on_progress)

    def _save(self, staging: Path, report: Report) -> None:
        super()._save(staging, report)
        self._roots = report.roots
        tensors, classes = self._learner.sends()
        if classes:
            method, values = self._config.method.name, self._learner.own().values
            said = facts(method, self._clip.identity, report.task, sorted(self._roots), values, classes)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, staging / SHARED, said)
        known = _saved("", self._learner.held, self._method.classes)
        known |= _saved("last.", self._learner.last, self._method.classes)
        if self._learner.last.classes:
            known["last.task"] = torch.tensor(self._learner.task)
        if self._learner.fusion is not None:
            known["fusion"] = self._learner.fusion
        if known:
            save_file(known, staging / MEMBER)


def _saved(prefix: str, images: Counted, classes: Sequence[str]) -> dict[str, torch.Tensor]:
    """Give what `_loaded` reads."""
    if not images.classes:
        return {}
    places = torch.tensor([classes.index(name) for name in images.classes])
    rows = {"features": images.features.contiguous(), "embeddings": images.embeddings.contiguous(), "classes": places}
    return {prefix + name: tensor for name, tensor in rows.items()}


def _loaded(known: Mapping[str, torch.Tensor], prefix: str, classes: Sequence[str], width: int) -> Counted:
    """Read what `_saved` gave; `width`: of the embeddings that the method counts apart."""
    if prefix + "features" not in known:
        return NOTHING
    features, names = known[prefix + "features"], tuple(classes[at] for at in known[prefix + "classes"].tolist())
    # An earlier version kept no embeddings; those means that these images are in are then not known either.
    unknown = torch.full((len(names), width), torch.nan)
    return Counted(features, known.get(prefix + "embeddings", unknown), names)


def _told(blob: Blob, result: _Other | str, failed: str) -> Site:
    """Say of a site what the report does."""
    told = Site(site=blob.site, sequence=blob.sequence, version=blob.version, sha256=blob.sha256)
    if isinstance(result, str):
        return replace(told, refused=result)
    shared = result.shared
    return replace(told, classes=len(shared.classes), images=sum(shared.images), refused=failed or None)


def _finite(module: InferenceModule) -> InferenceModule:
    """Raise ArithmeticError unless what a module answers by has finite numbers."""
    if not all(bool(getattr(module, name).isfinite().all()) for name in module.class_tensors):
        raise ArithmeticError("the sum of all sites has numbers that are not finite")
    return module


def _words(method: str, sha256: str, prompt: str) -> str:
    return f"{method} on the CLIP of sha256 {sha256[:12]}, prompt {prompt!r}"
