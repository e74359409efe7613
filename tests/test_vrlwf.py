"""VR-LwF: what is distilled, from whom, and that without it nothing but fine-tuning is left."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from pydantic import ValidationError

from agent.config import Lora, Method, Model, VrLwf
from agent.methods.base import Encoder, TaskData, task_generator
from agent.methods.finetune import Finetune
from agent.methods.student import AllWeights, Student, Teacher
from agent.methods.training import divergence
from agent.methods.vrlwf import VrLwf as Learner
from agent.methods.vrlwf import random_sentences
from agent.model.clip import Clip, ModelError, load_clip
from agent.model.images import CroppedImages, load_tokens
from exporter.decoders import Decoders
from exporter.preprocess import Preprocess, decode
from streams.archive_folder import ArchiveFolder
from tests.tiny import PlainTokens, silent, tiny_clip, tiny_task, tiny_timm_clip

QUICK = {"lr": 5e-3, "batch_size": 8, "epochs": 2}


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with closing(Decoders(10**6)) as decoders:
        yield decoders


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


def learner(clip: Clip, **settings) -> Learner:
    return Learner(clip, Method.model_validate({"vrlwf": {**QUICK, **settings}}))


def tasks(clip: Clip):
    return [tiny_task(clip, 1, ["red", "green"]), tiny_task(clip, 2, ["blue", "black", "red"], seed=1)]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_at_weight_zero_it_is_fine_tuning_bit_by_bit(clip, trainable):
    quick = {**QUICK, "trainable": trainable, "label_smoothing": 0.1}
    settings = {"seed": 5, "finetune": quick, "vrlwf": {**quick, "weight": 0}}
    plain, held = (cls(clip, Method.model_validate(settings)) for cls in (Finetune, Learner))
    for task in tasks(clip):
        plain.update(task, silent)
        held.update(task, silent)
    assert same(plain.state().tensors, held.state().tensors)
    # and with a weight it is not
    other = Learner(clip, Method.model_validate({"seed": 5, "vrlwf": quick}))
    for task in tasks(clip):
        other.update(task, silent)
    assert not same(plain.state().tensors, other.state().tensors)


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_the_first_teacher_is_the_untouched_model(clip, trainable):
    task = tiny_task(clip, 1, ["red", "green"])
    teacher = Teacher(Student(clip, Lora(), seed=0, trainable=trainable))
    index = torch.arange(len(task))
    assert torch.equal(teacher.encode_tokens(task.tokens.batch(index)), clip.encode_tokens(task.tokens.batch(index)))
    assert torch.equal(teacher.encode_ids(clip.tokenize(task.classes)), clip.encode_names(task.classes))


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_a_step_of_the_student_leaves_the_teacher_and_gives_the_distillation_something_to_pull_at(clip, trainable):
    """The published class-incremental code lets both share their storage, and its distillation does nothing."""
    task = tiny_task(clip, 1, ["red", "green"])
    tokens, ids = task.tokens.batch(torch.arange(8)), clip.tokenize(["red", "green", "blue"])
    student = Student(clip, Lora(), seed=0, trainable=trainable)
    teacher = Teacher(student)
    taught = [teacher.encode_tokens(tokens), teacher.encode_ids(ids)]
    # when the student takes one step
    optimizer = torch.optim.Adam(list(student.parameters()), lr=1e-2)
    (student.encode_tokens(tokens) @ student.encode_ids(ids).T).square().mean().backward()
    optimizer.step()
    # then the teacher says what it said, the student something else, and the loss between them has a gradient
    assert torch.equal(teacher.encode_tokens(tokens), taught[0])
    assert torch.equal(teacher.encode_ids(ids), taught[1])
    optimizer.zero_grad()
    given = 16 * student.encode_tokens(tokens) @ student.encode_ids(ids).T
    loss = divergence(16 * taught[0] @ taught[1].T, given, temperature=1.0)
    loss.backward()
    assert loss > 0 and max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) > 0


def test_the_teacher_of_a_task_is_the_model_as_it_was_before_it(clip, monkeypatch):
    teachers: list[Teacher] = []

    def watched(student: Student) -> Teacher:
        teachers.append(Teacher(student))
        return teachers[-1]

    monkeypatch.setattr("agent.methods.vrlwf.Teacher", watched)
    method, (first, second) = learner(clip), tasks(clip)
    tokens = first.tokens.batch(torch.arange(len(first)))
    method.update(first, silent)
    before = method.encode_tokens(tokens)
    method.update(second, silent)
    assert torch.equal(teachers[0].encode_tokens(tokens), clip.encode_tokens(tokens))
    assert torch.allclose(teachers[1].encode_tokens(tokens), before, atol=1e-6)
    assert not torch.allclose(before, clip.encode_tokens(tokens), atol=1e-3)
    assert not torch.allclose(before, method.encode_tokens(tokens), atol=1e-3)


@pytest.mark.parametrize("settings", [{"weight": 5}, {"preset": "zscl", "weight": 5, "label_smoothing": 0}])
def test_distillation_keeps_what_the_model_says_of_random_sentences(clip, settings):
    task = tiny_task(clip, 1, ["red", "green"])
    tokens = task.tokens.batch(torch.arange(len(task)))
    sentences = random_sentences(64, 8, clip.vocabulary, torch.Generator().manual_seed(9))
    untouched = Teacher(Student(clip, Lora(), seed=0))

    def moved(**chosen) -> float:
        method = learner(clip, **chosen)
        method.update(task, silent)
        now = Teacher(method._student)
        said = [16 * model.encode_tokens(tokens) @ model.encode_ids(sentences).T for model in (untouched, now)]
        return divergence(*said, temperature=1.0).item()

    assert moved(**settings) < 0.7 * moved(weight=0)


def test_random_sentences_have_ordinary_words_between_start_and_end():
    vocabulary = (49406, 49406, 49407)
    drawn = random_sentences(200, 8, vocabulary, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 10) and drawn.dtype == torch.int64
    assert (drawn[:, 0] == 49406).all() and (drawn[:, -1] == 49407).all()
    words = drawn[:, 1:-1]
    assert words.min() >= 0 and words.max() < 49406 and words.float().std() > 10_000
    assert torch.equal(drawn, random_sentences(200, 8, vocabulary, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("redraw", "different"), [("step", 6), ("task", 1)])
def test_sentences_are_drawn_in_every_step_or_once_per_task(clip, redraw, different):
    method = learner(clip, redraw=redraw, sentences=5, words=6)
    read: list[torch.Tensor] = []
    encode = method._student.encode_ids

    def watch(ids):
        if torch.is_grad_enabled() and ids.shape == (5, 8):
            read.append(ids)
        return encode(ids)

    method._student.encode_ids = watch
    method.update(tiny_task(clip, 1, ["red", "green"]), silent)
    assert len(read) == 6, "two epochs of three steps"
    assert len({tuple(ids.flatten().tolist()) for ids in read}) == different
    first = random_sentences(5, 6, clip.vocabulary, task_generator(0, 1, "sentences"))
    assert torch.equal(read[0], first)


def test_with_one_tower_the_student_reads_no_sentence_itself(clip):
    method = learner(clip, both_towers=False, sentences=5, words=6, seen_names=0)
    lengths: list[int] = []
    encode = method._student.encode_ids
    method._student.encode_ids = lambda ids: (lengths.append(len(ids)), encode(ids))[1]
    method.update(tiny_task(clip, 1, ["red", "green", "blue"]), silent)
    assert set(lengths) == {3}


def test_earlier_names_are_distilled_from_the_second_task_on_and_never_more_than_set(clip):
    method = learner(clip, seen_names=3, sentences=7)
    lengths: list[int] = []
    encode = method._student.encode_ids

    def watch(ids):
        if torch.is_grad_enabled():
            lengths.append(len(ids))
        return encode(ids)

    method._student.encode_ids = watch
    method.update(tiny_task(clip, 1, ["a", "b", "c", "d", "e"]), silent)
    assert set(lengths) == {5, 7}
    lengths.clear()
    method.update(tiny_task(clip, 2, ["x", "a"]), silent)
    assert set(lengths) == {2, 7, 3}, "two names of its own, seven sentences, three of the four others"


def test_the_divergence_has_the_gradient_of_the_published_cross_entropy():
    torch.manual_seed(0)
    teacher, student = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    (ours,) = torch.autograd.grad(divergence(teacher, student, 2.0), student)
    target = torch.softmax(teacher / 2, -1)
    published = -(target * torch.log_softmax(student / 2, -1)).sum(-1).mean() * 2**2
    (theirs,) = torch.autograd.grad(published, student)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert divergence(teacher, teacher, 2.0).abs() < 1e-6


@pytest.mark.parametrize("make", [tiny_clip, tiny_timm_clip])
def test_full_fine_tuning_trains_every_weight_behind_the_frozen_part_and_no_other(make):
    clip = make()
    size = clip.preprocess.size
    student = Student(clip, Lora(), seed=0, trainable="all")
    tokens = clip.prefix(torch.randn(2, 3, size, size))
    ids = clip.tokenize(["red", "green"])
    (student.encode_tokens(tokens) @ student.encode_ids(ids).T).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    # the others are those that made the tokens: changing them changes no feature
    trained = AllWeights(clip.image).weights()
    frozen = {name: torch.zeros_like(p) for name, p in clip.image.named_parameters() if name not in trained}
    assert frozen
    features = torch.func.functional_call(clip.image, frozen, (tokens,))
    assert torch.equal(features, clip.image(tokens))


def test_full_fine_tuning_learns_and_is_released_with_its_own_weights(clip):
    method = learner(clip, trainable="all", lr=1e-3, epochs=4)
    task = tiny_task(clip, 1, ["red", "green", "blue"])
    update = method.update(task, silent)
    predicted = method.inference_module().from_tokens(task.tokens.batch(torch.arange(len(task))))[2].argmax(1)
    assert update.drift_after > 0 and (predicted == task.labels).float().mean() > 0.9


def test_presets_give_the_published_forms_and_keys_beside_them_win():
    ours, paper, zscl = VrLwf(), VrLwf(preset="paper"), VrLwf(preset="zscl")
    assert (ours.sentences, ours.words, ours.redraw, ours.temperature) == (100, 8, "step", 1.0)
    assert (ours.weight, ours.both_towers, ours.both_directions, ours.seen_names > 0) == (0.5, True, False, True)
    recipe = {"preset", "loop", "trainable", "lr", "epochs", "batch_size"}
    assert paper.model_dump(exclude=recipe) == ours.model_dump(exclude=recipe), "the loss is the same"
    assert (paper.loop, paper.trainable, paper.lr, paper.epochs, paper.batch_size) == (
        "published",
        "all",
        1e-6,
        15,
        100,
    )
    assert (zscl.sentences, zscl.words, zscl.redraw, zscl.temperature) == (1000, 10, "task", 2.0)
    assert (zscl.weight, zscl.both_towers, zscl.both_directions, zscl.seen_names) == (1.0, False, True, 0)
    assert zscl.label_smoothing == 0.2 and zscl.lr == ours.lr and zscl.loop == "ours"
    assert VrLwf(preset="zscl", weight=5).weight == 5 and VrLwf(preset="paper", epochs=2).epochs == 2
    with pytest.raises(ValidationError, match="both_towes"):
        VrLwf(preset="zscl", both_towes=True)
    for preset in (paper, zscl):
        assert VrLwf(**preset.model_dump(mode="json")) == preset, "as a resolved configuration writes it"


def test_sentences_longer_than_the_model_reads_are_refused_at_once(clip):
    with pytest.raises(ModelError, match="words is 15, but this model reads at most 14"):
        learner(clip, words=15)


def test_a_model_with_another_vocabulary_is_refused_at_once():
    clip = tiny_clip()
    clip._tokenizer = type("OtherTokenizer", (), {"__call__": SimpleTokenizer.__call__})()
    with pytest.raises(ModelError, match="has a OtherTokenizer"):
        learner(clip)


class PngImages:
    """A task's images as files, and the task with both ways to read them."""

    def __init__(self, clip: Clip, decoders: Decoders, classes: list[str], per_class: int) -> None:
        self.files, labels = [], []
        for label, name in enumerate(classes):
            generator = np.random.default_rng(sum(name.encode()))
            base = generator.integers(0, 256, (48, 48, 3))
            for _ in range(per_class):
                pixels = np.clip(base + generator.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                self.files.append(file.getvalue())
                labels.append(label)
        read = [partial(bytes, file) for file in self.files]
        images = np.stack([clip.preprocess(decode(one(), 10**6)) for one in read])
        tokens = PlainTokens(clip.prefix(torch.from_numpy(images)))
        self.cropped = CroppedImages(read, clip, decoders)
        self.task = TaskData(1, tuple(classes), torch.tensor(labels), tokens, self.cropped)


def test_cropped_images_are_parts_of_a_wider_one_mirrored_half_the_time_and_repeat_with_the_generator(decoders):
    # given a model whose tokens are its pixels, and an image in which every pixel can be told from every other
    ramp = np.stack([np.arange(64).reshape(8, 8)] * 3, axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    pixels = Preprocess(7, (0.0, 0.0, 0.0), (1 / 255,) * 3)
    clip = SimpleNamespace(preprocess=pixels, prefix=lambda images: images)
    images = CroppedImages([file.getvalue], clip, decoders)

    drawn = images.batch(torch.zeros(400, dtype=torch.int64), torch.Generator().manual_seed(0))

    # then each is one of the 2 x 2 places where 7 pixels fit into 8, as it is or mirrored, and all occur about as often
    whole = torch.from_numpy(ramp[:, :, 0]).float()
    forms = [whole[top : top + 7, left : left + 7] for top in (0, 1) for left in (0, 1)]
    forms += [form.flip(-1) for form in forms]
    counts = [sum(torch.allclose(one[0], form, atol=1e-3) for one in drawn) for form in forms]
    assert sum(counts) == 400 and min(counts) > 25
    again = images.batch(torch.zeros(400, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_the_published_loop_crops_every_image_anew_and_leaves_out_what_is_not_full(clip, decoders, monkeypatch):
    images = PngImages(clip, decoders, ["red", "green"], 6)
    read: list[torch.Tensor] = []
    batch = images.cropped.batch

    def watched(index, generator, part):
        tokens = batch(index, generator, part)
        read.append(tokens)
        return tokens

    monkeypatch.setattr(images.cropped, "batch", watched)
    rates, norms = [], []
    adam = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return adam(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)

    update = learner(clip, loop="published", batch_size=5, epochs=2).update(images.task, silent)

    assert [len(tokens) for tokens in read] == [5] * 4 and update.steps == 4, "two of twelve images stay out"
    assert not any(torch.allclose(a[:1], b[:1]) for a in read[:2] for b in read[2:])
    assert set(rates) == {QUICK["lr"]} and max(norms) < 1 + 1e-4


def test_a_task_smaller_than_a_batch_is_learned_by_the_published_loop_too(clip, decoders):
    images = PngImages(clip, decoders, ["red", "green"], 3)
    assert learner(clip, loop="published", batch_size=100).update(images.task, silent).steps == 2


def test_the_published_loop_repeats_bit_by_bit_and_its_scale_is_learned_saved_and_released(clip, decoders):
    images = PngImages(clip, decoders, ["red", "green", "blue"], 4)
    first, second = (learner(clip, loop="published", trainable="all", lr=1e-3) for _ in range(2))
    for method in (first, second):
        method.update(images.task, silent)
    assert same(first.state().tensors, second.state().tensors)
    scale = first.state().tensors["log_scale"].exp().item()
    assert scale != pytest.approx(clip.logit_scale, rel=1e-4)
    # when it goes on from its state
    resumed = learner(clip, loop="published", trainable="all", lr=1e-3)
    resumed.load_state(first.state())
    # then it answers by the scale it learned, and says so where texts are encoded
    tokens = images.task.tokens.batch(torch.arange(12))
    embedding, _, probabilities = resumed.inference_module().from_tokens(tokens)
    expected = (scale * embedding @ resumed.encode_names(resumed.classes).T).softmax(-1)
    assert torch.allclose(probabilities, expected, atol=1e-5)
    assert resumed.text_module().scale == pytest.approx(scale)


def test_the_published_loop_needs_images_and_says_so(clip):
    with pytest.raises(ValueError, match="crops images, but the task has tokens alone"):
        learner(clip, loop="published").update(tiny_task(clip, 1, ["red", "green"]), silent)


def test_where_fine_tuning_unlearns_names_it_never_learns_distillation_wins_a_third_of_them_back(tmp_path, decoders):
    """Photographs of two CIFAR-10 classes are learned by all weights of the bundled model, zero-shot accuracy is over
    the other eight. Measured: fine-tuning keeps 54 % of it, VR-LwF 77 %, so that half of what was lost is won back."""
    clip = load_clip(Model())
    archive = ArchiveFolder("bundled", "train")

    def photographs(names: list[str], count: int) -> TaskData:
        read = [image.read for name in names for image in archive.images(name)[:count]]
        loaded = load_tokens(read, clip, decoders=decoders, cache_bytes=2**30, scratch=tmp_path)
        return TaskData(1, tuple(names), torch.arange(len(names)).repeat_interleave(count), loaded.tokens)

    learned = ["cat", "ship"]
    task, others = photographs(learned, 40), photographs([n for n in archive.classes if n not in learned], 30)

    def right(model: Encoder) -> float:
        images = model.encode_tokens(others.tokens.batch(torch.arange(len(others))))
        return (images @ model.encode_names(others.classes).T).argmax(1).eq(others.labels).float().mean().item()

    before = right(clip)
    hard = {"trainable": "all", "lr": 1e-3, "epochs": 6, "batch_size": 20}
    settings = Method.model_validate({"finetune": hard, "vrlwf": hard})
    retention = {}
    for cls in (Finetune, Learner):
        method = cls(clip, settings)
        method.update(task, silent)
        retention[cls] = right(method) / before
    lost = 1 - retention[Finetune]
    assert lost > 0.1
    assert retention[Learner] - retention[Finetune] > lost / 3
