"""Our own method, MG-CLIP's two halves at their best: preserve the gap while the towers adapt, and compensate exactly.

*Preserve and adapt.* K/V adapters of both towers learn a task's names by the local loss (MG-CLIP, arXiv 2507.09118,
equation 4) as long as the modality gap stays within the drift budget; what crosses it is rolled back. A part of the
task's images is held back from them. On these the cross entropy of the whole prediction, with and without the new
adapters, decides whether they stay: adapters are kept only where they pay, by more than the standard error.

*Compensate.* The visual space gets second-order statistics of the *untouched* tower's features, which no adapter moves:
what was counted stays true, however often the towers adapt, and two learners' statistics can be added. (1) Images
become random features (ReLU of random projections, as in RanPAC, arXiv 2307.02251) of two depths, as earlier layers
often tell classes apart that the embedding merges (LayUP, arXiv 2312.08888): of every token at the tower's `depth`,
averaged over the tokens, and of the embedding. (2) A class mean, and one within-class scatter shared by all classes,
are updated exactly; a linear discriminant follows in closed form, its scatter shrunk toward a sphere and its means
toward the mean of all images, each as if by a fixed number of images. (3) A prediction is the softmax of temperature *
discriminant + weight * similarity of the adapted towers' embeddings; both numbers minimise the cross entropy on some of
the task's images, each scored as if it had not been learned (leave one out, in closed form, up to the discriminant's
centre and prior), and on what stands for images of all other classes (agent/methods/fusion.py). So texts lead where
images are few, and images where they are many.

With a drift budget of 0 neither tower moves. The statistics do not depend on how a stream is cut into tasks, but for
the rounding.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from agent import config
from agent.methods.base import (
    NOTHING,
    Counted,
    InferenceModule,
    LearnerState,
    OnProgress,
    TaskData,
    TextModule,
    check_learned,
    task_generator,
)
from agent.methods.discriminant import Discriminant, RandomFeatures, Solved, Statistics
from agent.methods.fusion import Fusion, LeftOut, Scored
from agent.methods.student import Student
from agent.methods.training import GapWatch, Training, admit, cosine, local_loss, packed, unpack, untrained
from agent.model import ranks
from agent.model.clip import Clip
from agent.model.gap import within_budget
from agent.model.images import TokensAt
from agent.model.lora import merged
from agent.values import Adaptation, GapStatistics, Progress, Update

log = logging.getLogger(__name__)

BATCH = 64
"""Images whose random features of every token are in memory at once: 64 x 196 tokens x 3,000 features are 150 MB."""
CALIBRATION_IMAGES = 256
"""Images of a task that the fusion's two numbers are fitted to, and that adapters are judged by. Two numbers need no
more; each further image costs a solve with the scatter's Cholesky factor."""
MOVED = 4
"""Times each of these images is moved to another class. Chosen on training images that no comparison uses; with one,
the mean accuracy of twenty streams was 0.1 points less."""
HELD_SHARE = 0.25
"""At most this share of a task's images is held back from the adapters: chosen by hand, as validation sets are."""
LEAST_HELD = 16
"""With fewer images to judge by nothing is adapted: chosen by hand; the mean of fewer says little."""
EPOCHS = 1
"""Epochs of adapter training, as MG-CLIP's own."""
LEARNING_RATE = 1e-3
"""Adam's, as MG-CLIP's own."""
ADAPTER_BATCH = 32
"""Samples of a step of adapter training."""
HALVINGS = 10
"""Adapters beyond the budget are halved at most this often, then they are taken away: a thousandth of what they were
moves the gap by less than rounding does."""
MOVED_SCORES = 2**19
"""Moved images times classes at most, so that fitting to them takes about half a second on a core with 500 classes or
more; 1,024 images take 6 s with 5,000 classes."""
START = Fusion(temperature=0.002, text_weight=0.5)
"""The fusion that the first measured one leans on: chosen by hand."""


class Gapstream:
    """It is the default method: adapters under a gap budget, second-order statistics. See the module's first lines."""

    name = "gapstream"
    fusion = "text+discriminant"

    def __init__(self, clip: Clip, settings: config.Method) -> None:
        self._clip = clip
        self._seed = settings.seed
        self._prior = settings.gapstream.prior_images
        self._budget = settings.gapstream.drift_budget
        features = settings.gapstream.features
        self._random = RandomFeatures(clip, features, task_generator(settings.seed, 0, "random features"))
        self._depth = clip.image.depth
        """The block whose input tokens the random features are of."""
        self._statistics = Statistics(features, clip.embed_dim, clip.device)
        self._lora = settings.lora
        self._student = Student(clip, settings.lora, settings.seed)
        self._adapted = False
        """Whether the adapters change anything; while they do not, the towers are used as they are."""
        self._classes: list[str] = []
        self._fusion = START
        self._names = torch.zeros(0, clip.embed_dim, device=clip.device)
        """Features of the learned names by the adapted text tower; read only while it is adapted."""
        self._untouched_names = self._names
        """The same by the untouched one; both may lack the last names, see `_class_names`."""
        self._solved: Solved | None = None
        self.calibration = NOTHING
        """The images of the last task that the fusion was fitted to, for a site of a fleet. It is not in the state, and
        the next task does not use it."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def encode_names(self, names: Sequence[str]) -> Tensor:
        return (self._student if self._adapted else self._clip).encode_names(names)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        if not self._adapted:
            return self._clip.encode_tokens(tokens)
        with torch.no_grad():
            return self._student.encode_tokens(tokens)

    def text_module(self) -> TextModule:
        return self._student.text_module() if self._adapted else TextModule(self._clip, merged(self._clip.text, {}))

    def update(self, task: TaskData, on_progress: OnProgress) -> Update:
        started = time.perf_counter()
        watch, found = self._watch(task, on_progress)
        admit(self._classes, task)
        self._statistics.widen(len(self._classes))
        where = torch.tensor([self._classes.index(name) for name in task.classes])
        labels = where[task.labels].to(self._clip.device)
        sample = torch.randperm(len(task), generator=task_generator(self._seed, task.number, "calibration"))
        images = self._statistics.counts + labels.bincount(minlength=len(self._classes))
        able = (images[labels] > 1).cpu()  # to be left out: their class keeps an image
        chosen = sample[:CALIBRATION_IMAGES]
        chosen = chosen[able[chosen]]
        held = chosen[: int(HELD_SHARE * int(able.sum()))].sort().values
        chosen = chosen.sort().values
        # nothing is adapted without a budget, with nothing to tell apart, or with too little to judge by
        adapts = self._budget and len(task.classes) > 1 and len(held) >= LEAST_HELD
        trial = self._adapt(task, chosen, held, watch, on_progress) if adapts else None
        made = trial.training.update() if trial else untrained(task, watch, started, on_progress)
        trained = time.perf_counter()
        self.calibration = self._count(task, labels, chosen, on_progress)
        self._fusion, real = self._fitted(self.calibration, task.number)
        adaptation = self._decide(real, task, chosen, trial) if trial else None
        fused = {"temperature": self._fusion.temperature, "text_weight": self._fusion.text_weight}
        if adaptation is not None and not adaptation.kept:
            made = replace(made, epochs=0, loss=None, gap_after=made.gap_before, drift_after=made.drift_before)
        return replace(
            made,
            samples=len(task),
            gap_before=found,
            drift_before=watch.drift(found),
            budget=self._budget or None,
            seconds={"train": trained - started, "compensate": time.perf_counter() - trained},
            details=fused,
            adaptation=adaptation,
        )

    def _watch(self, task: TaskData, on_progress: OnProgress) -> tuple[GapWatch, GapStatistics]:
        """Measure the gap on the task; gives it as it was found, too.

        Where the task's names and images show a drift beyond the budget, which those of no task before did, the
        adapters are halved until it is inside; without a budget they are taken away. No statistics depend on them."""
        watch = GapWatch(self, self._clip, task, self._seed, moved=self._adapted)
        found, halvings = watch.before, 0
        while self._adapted and not (self._budget and within_budget(watch.drift(watch.before), None, self._budget)):
            gone = not self._budget or halvings == HALVINGS
            log.warning(
                "task %d: the adapters are %s: the gap's drift on its images is %s, the budget %g",
                task.number, "taken away" if gone else "halved", watch.drift(watch.before), self._budget,
            )  # fmt: skip
            self._student.weaken(0 if gone else 0.5)
            self._adapted, self._names = not gone, self._names[:0]
            watch.before = watch.measure()
            halvings += 1
            on_progress(Progress("train", task.number, drift=watch.drift(watch.before), budget=self._budget))
        return watch, found

    def _adapt(self, task: TaskData, chosen: Tensor, held: Tensor, watch: GapWatch, on_progress: OnProgress) -> Trial:
        """Train the adapters on the images that are not held back; the last state inside the budget is what stays."""
        student, scale = self._student, self._clip.logit_scale
        others = torch.ones(len(task), dtype=torch.bool).index_fill_(0, held, False).nonzero().squeeze(1)
        part = TaskData(task.number, task.classes, task.labels[others], TokensAt(task.tokens, others))
        labels, ids = part.labels.to(self._clip.device), self._clip.tokenize(task.classes)
        training = Training(
            part,
            student,
            torch.optim.Adam(list(student.parameters()), lr=LEARNING_RATE),
            epochs=EPOCHS,
            batch_size=ADAPTER_BATCH,
            decay=cosine,
            watch=watch,
            seed=self._seed,
            on_progress=on_progress,
            budget=self._budget,
        )
        before = self._embed(task, held) if self._adapted else None
        trial = Trial(self._adapted, student.tensors(), self._class_names(), before, held, training)
        self._adapted, self._names = True, self._names[:0]
        for epoch in range(training.epochs):
            for index in training.batches(epoch):
                images = student.encode_tokens(part.tokens.batch(index))
                names = student.encode_ids(ids)
                training.descend(local_loss(images, names, labels[index.to(labels.device)], scale))
            if not training.keep(lambda drifts: within_budget(drifts[-1], None, self._budget)):
                break
        return trial

    def _embed(self, task: TaskData, index: Tensor) -> Tensor:
        """Encode some images of a task with the towers as they are now: float32 [n, D]."""
        return ranks.encoded(task.tokens, index, self.encode_tokens, BATCH)

    @torch.no_grad()
    def _count(self, task: TaskData, labels: Tensor, chosen: Tensor, on_progress: OnProgress) -> Counted:
        """Count all images of the task into the statistics; gives what the chosen ones, int64 [n] in ascending order,
        are counted by."""
        among = torch.zeros(len(task), dtype=torch.bool)
        among[chosen] = True
        kept, embeddings = [], []
        mine = ranks.mine(task.tokens, torch.arange(len(task)))
        if ranks.rank():  # what was counted before is in the sum over the ranks once
            self._statistics.clear()
        # 16 batches at once, chosen by hand: each call of `count` updates the whole scatter [M, M], which costs less
        # for many images together; fewer at once only take longer, more need more memory.
        for index in mine.split(16 * BATCH):
            features, embedding = self._features(task, index, on_progress)
            self._statistics.count(features, embedding, labels[index.to(labels.device)])
            here = among[index].to(features.device)
            kept.append(features[here])
            embeddings.append(embedding[here])
        self._statistics.sum()
        self._solved = self._statistics.solve(self._prior)
        features, embedding = (ranks.of_all(task.tokens, chosen, torch.cat(rows)) for rows in (kept, embeddings))
        return Counted(features, embedding, task.names(chosen))

    def _features(self, task: TaskData, index: Tensor, on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """Compute random features float32 [n, M] and untouched embeddings [n, D] of some images, in batches of few
        activations."""
        both = []
        # a rank that owns no image computes the shapes from one that does not count
        for part in (index if len(index) else torch.zeros(1, dtype=torch.int64)).split(BATCH):
            with self._clip.autocast():
                middle, embedding = self._clip.image.at_depth(
                    task.tokens.batch(part).to(self._clip.device), self._depth
                )
            embedding = F.normalize(embedding.float(), dim=-1)
            both.append((self._random(middle, embedding), embedding))
            done = int(part[-1]) + 1
            place = {"step": math.ceil(done / BATCH), "steps": math.ceil(len(task) / BATCH), "samples": done}
            on_progress(Progress("compensate", task.number, **place))
        features, embeddings = zip(*both, strict=True)
        return torch.cat(features)[: len(index)], torch.cat(embeddings)[: len(index)]

    @torch.no_grad()
    def counted(self, task: TaskData, index: Tensor) -> Counted:
        """Compute what some images of a task, int64 [n], are counted by."""
        return Counted(*self._features(task, index, lambda progress: None), task.names(index))

    @torch.no_grad()
    def fitted(self, images: Counted, number: int) -> Fusion:
        """Fit the fusion to images of the task of this number, which are counted already, for all classes that are
        known now; nothing is changed."""
        return self._fitted(images, number)[0]

    def _fitted(self, images: Counted, number: int) -> tuple[Fusion, Scored]:
        """Fit the fusion by the untouched towers, since adapted ones may know these very images; gives what the images
        are scored by, too."""
        names = {name: at for at, name in enumerate(self._classes)}
        device = self._clip.device
        labels = torch.tensor([names[name] for name in images.classes], dtype=torch.int64, device=device)
        features, embeddings = images.features.to(device), images.embeddings.to(device)
        left = LeftOut(self._solve(), features, labels, self._statistics.counts)
        texts = self._clip.logit_scale * self._clip_names()
        real = Scored(left.scores(), embeddings @ texts.T, labels)
        if not len(labels) or len(self._classes) < 2:
            return self._fusion, real
        means = self._statistics.embeddings
        known = means.isfinite().all(1)
        others = known.index_fill(0, labels.unique(), False).nonzero().squeeze(1)
        index = known[labels].nonzero().squeeze(1).repeat(MOVED if len(others) else 0)
        generator = task_generator(self._seed, number, "moved")
        if len(index) > (most := MOVED_SCORES // len(self._classes)):
            index = index[torch.randperm(len(index), generator=generator)[:most].to(device)]
        to = others[torch.randint(max(len(others), 1), (len(index),), generator=generator).to(device)]
        away = left.stretch(index, to)[:, None] * (embeddings - means[labels])[index]
        moved = Scored(left.moved(index, to), F.normalize(means[to] + away, dim=-1) @ texts.T, to)
        return self._fusion.fitted(real, moved), real

    @torch.no_grad()
    def _decide(self, real: Scored, task: TaskData, chosen: Tensor, trial: Trial) -> Adaptation:
        """Decide whether a trial's adapters stay: where the images held back, each left out of the discriminant in its
        turn, win by more than their standard error. real: what the chosen images, int64 [n], are scored by."""
        drift = trial.training.drifts[-1]
        decided = Adaptation(
            kept=False,
            epochs=trial.training.kept,
            drift=drift if drift is None or math.isfinite(drift) else None,
            budget=self._budget,
            images=len(trial.held),
        )
        if trial.training.kept:
            here = torch.isin(chosen, trial.held).to(real.labels.device)
            visual, labels, scale = real.visual[here], real.labels[here], self._clip.logit_scale
            before = real.text[here] if trial.images is None else scale * trial.images @ trial.names.T
            after = scale * self._embed(task, trial.held) @ self._class_names().T
            gains = self._fusion.losses(visual, before, labels) - self._fusion.losses(visual, after, labels)
            # Ranks of unlike processors may differ in the last bits, and must not in what they decide.
            gain, error = ranks.agreed([gains.mean().item(), (gains.std() / math.sqrt(len(gains))).item()])
            decided = replace(decided, kept=stay(gain, error), gain=gain, error=error)
        if not decided.kept:
            self._student.load_tensors(trial.adapters)
            self._adapted, self._names = trial.adapted, trial.names
        log.info("task %d: %s", task.number, decided.words())
        return decided

    def _class_names(self) -> Tensor:
        """Give the features of the learned names, float32 [C, D]; a name is encoded again only when the text tower has
        moved."""
        if not self._adapted:
            return self._clip_names()
        missing = self._classes[len(self._names) :]
        if missing:
            self._names = torch.cat([self._names, self.encode_names(missing)])
        return self._names

    def _clip_names(self) -> Tensor:
        """Give the features of the learned names by the untouched text tower, float32 [C, D]."""
        missing = self._classes[len(self._untouched_names) :]
        if missing:
            self._untouched_names = torch.cat([self._untouched_names, self._clip.encode_names(missing)])
        return self._untouched_names

    def _solve(self) -> Solved:
        """Give the discriminant of all that is counted."""
        if self._solved is None:
            self._solved = self._statistics.solve(self._prior)
        return self._solved

    @torch.no_grad()
    def inference_module(self) -> InferenceModule:
        check_learned(self.classes)
        solved = self._solve()
        scale, rows = self._fusion.temperature * solved.images, solved.rows
        bias = -scale / 2 * solved.norms
        names = self._fusion.text_weight * self._clip.logit_scale * self._class_names()
        tower = merged(self._clip.image, {})
        adapted = self._student.merged_image_tower() if self._adapted else None
        centre = solved.centre
        return Discriminant(tower, adapted, self.classes, names, scale * rows, bias, centre, self._random, self._depth)

    @property
    def weights(self) -> Fusion:
        """The two numbers that this predicts with."""
        return self._fusion

    def weigh(self, fusion: Fusion) -> None:
        """Predict with this fusion from now on."""
        self._fusion = fusion

    def state(self) -> LearnerState:
        statistics, fusion = self._statistics, (self._fusion.temperature, self._fusion.text_weight)
        tensors = {
            "random.tokens": self._random.tokens.clone(),
            "random.embedding": self._random.embedding.clone(),
            "counts": statistics.counts.clone(),
            "means": statistics.means.clone(),
            "embeddings": statistics.embeddings.clone(),
            "scatter": packed(statistics.scatter),
            "names": self._class_names().clone(),
            "fusion": torch.tensor(fusion, dtype=torch.float64),
        }
        # with a budget they are there before they are used: a state's size depends on the classes alone
        adapters = self._student.tensors() if self._adapted or self._budget else {}
        if (
            adapters
        ):  # encoded again all at once they would differ in the last bits, and so would what is fitted to them
            adapters["untouched_names"] = self._clip_names().clone()
        depth = {"depth": self._depth} if self._depth else {}
        return LearnerState(tensors | adapters, {"classes": list(self._classes), **depth})

    def load_state(self, state: LearnerState) -> None:
        tensors = {name: tensor.to(self._clip.device) for name, tensor in state.tensors.items()}
        self._random.load(tensors["random.tokens"], tensors["random.embedding"])
        self._statistics.counts, self._statistics.means = tensors["counts"].clone(), tensors["means"].clone()
        # an earlier version did not count them
        unknown = torch.full((len(self._statistics.means), self._clip.embed_dim), math.nan, device=self._clip.device)
        self._statistics.embeddings = tensors.get("embeddings", unknown).clone()
        unpack(tensors["scatter"], self._statistics.scatter)
        self._names = tensors["names"].clone()
        self._fusion = Fusion(*state.tensors["fusion"].tolist())
        self._classes = list(state.values["classes"])
        self._depth = state.values.get("depth", 0)
        self._student = Student(self._clip, self._lora, self._seed)
        added = [tensor for name, tensor in tensors.items() if ".up." in name]
        # A state that was made without a budget has no adapters. Those that add nothing count too: training goes on
        # from their other factor.
        if added:
            self._student.load_tensors(tensors)
        self._adapted = any(bool(tensor.any()) for tensor in added)
        self._untouched_names = tensors.get("untouched_names", self._names[:0]) if self._adapted else self._names
        self._solved, self.calibration = None, NOTHING


def stay(gain: float, error: float) -> bool:
    """Decide about adapters by the mean gain of the images held back and its standard error: they stay where they win
    by more than chance does."""
    return gain > error


@dataclass(frozen=True)
class Trial:
    """It is an adaptation that is still to be judged, with what was before it."""

    adapted: bool
    """Whether adapters were in use before."""
    adapters: Mapping[str, Tensor]
    names: Tensor
    """Features of all learned names, the task's among them, [C, D]."""
    images: Tensor | None
    """Embeddings of the images that judge, [n, D]; None for the untouched ones."""
    held: Tensor
    """Places in the task of the images that judge, int64, ascending; the adapters were not trained on them."""
    training: Training
