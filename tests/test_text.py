"""Names that were never learned: ids and embeddings are those of training, scores leave room for the learned."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
from open_clip.tokenizer import get_clean_fn
from PIL import Image

from agent.methods.base import TextModule
from agent.methods.classifiers import TextHead
from agent.model.clip import Clip, ModelError
from agent.model.lora import merged
from exporter import release as releases
from exporter import text as texts
from exporter.onnx import OnnxExporter
from exporter.release import Release, ReleaseError
from exporter.runtime import Classifier, NamesError, Prepared
from exporter.text import CLEANUPS, name_encoder
from exporter.text_export import TextToRelease
from exporter.trace_cache import user_cache
from tests.tiny import tiny_clip, tiny_timm_clip

LEARNED = ("cat", "dog", "big red ship")
ODD = (
    "zebra", "Größe Übermaß ÄÖÜ", "emoji 🐱‍👤 👩‍👩‍👧 x", "1234 56.78", "it's they're WE'VE i'M y'all'd", "'\u017f K",
    "&amp;lt;b&gt; caf&eacute; &nbsp; x &#x27;s", "a\u00a0b\tc\nd", " x ", "ΣΊΣΥΦΟΣ", "İstanbul \u06edİ\u06ed",
    "ﬁnancial", "“quoted” \u2019s", "cafe\u0301", "日本語 テスト", "العربية", "हिन्दी", "<end_of_text> a<start_of_text>",
    "x" * 300, "word " * 100, "", "!!!???...", "foo_bar-baz/qux", "ⅷ ² ½", "\x1c\x1d a", "a\u200bb", "ÃƒÂ©", "ǅ ǆ ß ẞ",
)  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.mark.parametrize("name", ODD)
def test_the_released_tokenizer_gives_the_ids_of_training(clip, name):
    tokenizer, clean = clip.tokenizer

    ids = tokenizers.Tokenizer.from_str(tokenizer).encode(CLEANUPS[clean](name)).ids

    [expected] = clip.tokenize([name], "{}").tolist()
    assert ids == expected[: len(ids)] and not any(expected[len(ids) :])


def test_a_tower_that_reads_the_whole_context_gets_it_filled_up():
    clip = tiny_timm_clip()
    tokenizer, clean = clip.tokenizer
    for name in ODD:
        ids = tokenizers.Tokenizer.from_str(tokenizer).encode(CLEANUPS[clean](name)).ids
        assert ids == clip.tokenize([name], "{}")[0].tolist()


class WrappedTokenizer:
    """As open_clip wraps a Hugging Face tokenizer."""

    context_length = 6
    clean_fn = staticmethod(get_clean_fn("canonicalize"))

    def __init__(self) -> None:
        vocabulary = {"<pad>": 1, "<unk>": 0, "a": 2, "thing": 3, "of": 4, "glass": 5}
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        self.tokenizer = SimpleNamespace(backend_tokenizer=fast, pad_token_id=1)


def test_a_wrapped_tokenizer_is_taken_as_it_is_and_an_unknown_one_is_refused():
    clip = tiny_clip(1)
    clip._tokenizer = WrappedTokenizer()

    tokenizer, clean = clip.tokenizer

    text = CLEANUPS[clean](" A  thing_of  GLASS! ")
    assert clean == "canonicalize" and text == "a thing of glass"
    assert tokenizers.Tokenizer.from_str(tokenizer).encode(text).ids == [2, 3, 4, 5, 1, 1]

    other = tiny_clip(1)
    other._tokenizer = SimpleNamespace(context_length=6, clean_fn=str.lower)
    with pytest.raises(ModelError, match=r"a SimpleNamespace, cannot be released"):
        _ = other.tokenizer


@pytest.mark.parametrize("name", ODD)
def test_texts_are_cleaned_as_open_clip_does_it(name):
    for kind, clean in CLEANUPS.items():
        assert clean(name) == get_clean_fn(kind)(name)


class Exports:
    """Releases of a tiny CLIP, made by one exporter into numbered folders."""

    def __init__(self, clip: Clip, path: Path) -> None:
        self.clip = clip
        self.path = path
        self.exporter = OnnxExporter(max_batch=4, traces=user_cache())
        self.made: list[Release] = []

    def release(self, adapted: float = 0.0, classes: Sequence[str] = LEARNED, **changes: object) -> Release:
        """`adapted`: how far the text tower's adapted weights are from the untouched ones."""
        text = self.text(adapted)
        module = TextHead(merged(self.clip.image, {}), tuple(classes), rows(text, classes), 100.0)
        size = self.clip.preprocess.size
        images = np.random.default_rng(0).normal(size=(3, 3, size, size)).astype(np.float32)
        tower = TextToRelease(text, lambda: self.clip.tokenizer)
        part = replace(tower, **changes) if changes.get("text", True) else None
        before = self.made[-1].path if self.made else None
        folder = self.path / str(len(self.made) + 1)
        self.made.append(
            self.exporter.release(module, self.clip.preprocess, {}, folder, images, text=part, before=before)
        )
        return self.made[-1]

    def text(self, adapted: float) -> TextModule:
        weights = {n: p + adapted for n, p in self.clip.text.named_parameters() if n.endswith("in_proj_weight")}
        return TextModule(self.clip, merged(self.clip.text, weights))


def rows(text: TextModule, names: Sequence[str]) -> torch.Tensor:
    with torch.no_grad():
        return text(text.tokenize(names))


@pytest.fixture(scope="module")
def exports(clip, tmp_path_factory) -> Exports:
    exports = Exports(clip, tmp_path_factory.mktemp("releases"))
    exports.release()
    exports.release(adapted=0.05, classes=(*LEARNED, "frog"))
    return exports


def test_any_number_of_names_has_the_embeddings_of_training(exports):
    for release, adapted in zip(exports.made, (0.0, 0.05), strict=True):
        part = release.text
        assert part.refused is None and part.difference < 1e-5 and part.cosine > 0.9999
        encode = name_encoder(release.path, part.prompt, part.clean, "cpu", 1)
        for names in (["zebra"], ["word " * 40], ["okapi", "a thing of many words and letters", "x"]):
            np.testing.assert_allclose(encode(names), rows(exports.text(adapted), names).numpy(), atol=1e-5)


def test_a_later_release_is_not_traced_again_and_shares_what_learning_never_changes(exports):
    first, second = exports.made
    assert second.seconds["trace"] == 0
    for name in ("text.onnx.data", "tokenizer.json"):
        assert (first.path / name).samefile(second.path / name)
    assert first.files["text.onnx"] != second.files["text.onnx"] and first.id != second.id
    assert releases.read(second.path) == second
    second.verify()


def test_shared_files_are_written_where_the_release_before_has_them_damaged(clip, tmp_path):
    exports = Exports(clip, tmp_path)
    first = exports.release()
    (first.path / "tokenizer.json").write_text("damaged")

    second = exports.release()

    assert (first.path / "tokenizer.json").read_text() == "damaged"
    second.verify()
    assert (first.path / "text.onnx.data").samefile(second.path / "text.onnx.data")


def test_a_tokenizer_that_does_not_fit_leaves_the_text_part_out_and_the_release_says_why(exports, caplog):
    other = open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")
    other.bpe_ranks = dict(list(other.bpe_ranks.items())[:1000])
    clip = tiny_clip(1)
    clip._tokenizer = other

    with caplog.at_level(logging.WARNING):
        release = exports.release(tokenizer=lambda: clip.tokenizer)

    assert "embeddings of 7 names differ by" in release.text.refused and "has no text part" in caplog.text
    assert (
        set(release.files)
        == {"model.onnx", "golden.npz"}
        == {f.name for f in release.path.iterdir()} - {"release.json"}
    )
    with pytest.raises(NamesError, match="scores only the classes it has learned: embeddings of 7 names differ by"):
        Classifier(release.path).classify([picture()], extra=["zebra"])
    exports.made.pop()


def test_a_model_without_a_tokenizer_to_release_is_released_without_names(clip, tmp_path):
    def none() -> tuple[str, str]:
        raise ModelError("the tokenizer of X, a Y, cannot be released")

    release = Exports(clip, tmp_path).release(tokenizer=none)

    assert "a Y, cannot be released" in release.text.refused and release.text_files == []
    assert len(Classifier(release.path).classify([picture()])[0].labels) == 3


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), MemoryError("8 GB")])
def test_a_fault_of_the_machine_is_raised_and_makes_no_release_without_names(clip, tmp_path, fault):
    def fails() -> tuple[str, str]:
        raise fault

    with pytest.raises(type(fault)):
        Exports(clip, tmp_path).release(tokenizer=fails)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def prepared(classifier: Classifier, names: Sequence[str]) -> Prepared:
    preprocess = classifier.release.preprocess
    return Prepared(preprocess(picture()), preprocess, tuple(names))


def test_an_extra_name_takes_its_share_of_the_similarities_and_the_learned_classes_keep_their_proportions(exports):
    release = exports.made[0]
    classifier = Classifier(release.path, threads=1)
    extra = ("zebra", "okapi")
    for seed in range(3):
        [plain] = classifier.classify([picture(seed)], top=0)
        [answer] = classifier.classify([picture(seed)], top=0, extra=extra)
        learned, scores = (
            dict(zip(plain.labels, plain.scores, strict=True)),
            dict(zip(answer.labels, answer.scores, strict=True)),
        )

        pixels = classifier.release.preprocess(picture(seed))[None]
        embedding = torch.from_numpy(classifier._served.session.run(pixels).embedding)
        similar = exports.clip.logit_scale * embedding @ rows(exports.text(0), [*LEARNED, *extra]).T
        shares = similar.softmax(-1)[0, -2:].tolist()

        assert [scores[name] for name in extra] == pytest.approx(shares, abs=1e-5)
        assert {n: scores[n] for n in LEARNED} == pytest.approx(
            {n: learned[n] * (1 - sum(shares)) for n in LEARNED}, abs=1e-5
        )
        assert sum(answer.scores) == pytest.approx(1, abs=1e-5) and list(answer.scores) == sorted(answer.scores)[::-1]


def test_names_that_are_learned_or_the_same_to_the_tokenizer_count_once(exports):
    classifier = Classifier(exports.made[0].path, threads=1)
    [plain] = classifier.classify([picture()], top=0)

    assert classifier.classify([picture()], top=0, extra=["cat", " DOG", "Big  red ship"]) == [plain]
    [answer] = classifier.classify([picture()], top=0, extra=["Zebra", "cat", "zebra "])
    assert sorted(answer.labels) == sorted([*LEARNED, "Zebra"])


def test_a_prepared_image_brings_its_own_names_into_a_common_batch(exports):
    classifier = Classifier(exports.made[0].path, threads=1)
    asked = [(), ("zebra",), ("okapi", "zebra")]

    together = classifier.classify([prepared(classifier, names) for names in asked], top=0)

    for answer, names in zip(together, asked, strict=True):
        [alone] = classifier.classify([picture()], top=0, extra=names)
        assert dict(zip(answer.labels, answer.scores, strict=True)) == pytest.approx(
            dict(zip(alone.labels, alone.scores, strict=True)), abs=1e-5
        )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "c"], "got 3 extra names, expected at most 2"),
        (["zebra", " "], "' ' of 1 characters, expected 1 to 9, not all blank"),
        (["a zebra in the grass"], "of 20 characters, expected 1 to 9"),
    ],
)
def test_too_many_or_impossible_names_are_refused_with_what_is_expected(names, said, exports):
    classifier = Classifier(exports.made[0].path, max_names=2, max_name_chars=9)
    for ask in (
        classifier.check_names,
        classifier.encode_names,
        lambda names: classifier.classify([picture()], extra=names),
    ):
        with pytest.raises(NamesError, match=said):
            ask(names)


def test_names_are_kept_up_to_a_bound_and_the_oldest_go_first(exports, monkeypatch):
    monkeypatch.setattr(texts, "KEPT_NAMES", 2)
    release = exports.made[0]
    names = texts.NameEmbeddings(release, release.text, "cpu", 1)
    for asked in (["a"], ["b"], ["a"], ["c"]):
        names.rows(asked)

    assert list(names._kept) == ["a", "c"]
    found, embeddings = names.rows(["b", "d", "e"])
    assert found == ["b", "d", "e"] and embeddings.shape == (6, 24) and len(names._kept) == 2


def test_names_that_are_kept_do_not_wait_for_new_ones_being_encoded(exports):
    # given a text part that has encoded one name, and is at work on another
    release = exports.made[0]
    names = texts.NameEmbeddings(release, release.text, "cpu", 1)
    _, known = names.rows(["zebra"])
    encode, begun, goes_on = names.open(), threading.Event(), threading.Event()

    def slow(asked: Sequence[str]) -> np.ndarray:
        begun.set()
        assert goes_on.wait(20)
        return encode(asked)

    names._encode = slow
    with ThreadPoolExecutor(2) as pool:
        new = pool.submit(names.rows, ["okapi"])
        assert begun.wait(20)

        # when the first is asked for again, then it is there
        try:
            _, again = pool.submit(names.rows, ["zebra"]).result(20)
        finally:
            goes_on.set()

        np.testing.assert_array_equal(again, known)
        assert new.result(20)[0] == ["okapi"]


def test_a_newer_release_answers_with_its_own_text_tower(exports, tmp_path):
    def point(number: int) -> None:
        (tmp_path / "RELEASE.new").symlink_to(exports.made[number].path)
        (tmp_path / "RELEASE.new").rename(tmp_path / "RELEASE")

    point(0)
    classifier = Classifier(tmp_path, threads=1)
    image = prepared(classifier, ["zebra", "frog"])
    assert "frog" in classifier.classify([image], top=0)[0].labels

    point(1)
    assert classifier.refresh()

    assert classifier._served.names.opened  # before anyone asks, since names were asked for before
    [answer] = classifier.classify([image], top=0)
    assert answer == Classifier(exports.made[1].path, threads=1).classify([picture()], 0, ["zebra"])[0]


def test_a_damaged_text_part_is_noticed_when_a_name_is_asked_for_and_read_once(clip, tmp_path, monkeypatch):
    release = Exports(clip, tmp_path).release()
    (release.path / "text.npy").write_bytes(b"damaged")
    classifier = Classifier(release.path)

    assert len(classifier.classify([picture()])[0].labels) == 3
    reads = []
    verify = Release.verify
    monkeypatch.setattr(Release, "verify", lambda *arguments: reads.append(1) or verify(*arguments))
    for _ in range(3):
        with pytest.raises(ReleaseError, match=r"text\.npy has .* it is damaged and not used"):
            classifier.classify([picture()], extra=["zebra"])
    assert len(reads) == 1


def test_a_text_part_that_answers_otherwise_than_in_training_is_not_used(clip, tmp_path):
    release = Exports(clip, tmp_path).release()
    np.save(release.path / "text.npy", np.load(release.path / "text.npy") + np.float32(0.1))
    releases.write(replace(release, files={name: releases.digest(release.path / name) for name in release.files}))

    with pytest.raises(ReleaseError, match=r"fails its own test: embeddings of class names differ by 0\.1"):
        Classifier(release.path).classify([picture()], extra=["zebra"])
