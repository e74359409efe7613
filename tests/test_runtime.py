"""The runtime answers from the current release, follows it under load, and needs no torch."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from exporter import golden, runtime
from exporter import release as releases
from exporter.decoders import Decoders
from exporter.onnx import OnnxExporter
from exporter.preprocess import ImageError, Preprocess
from exporter.release import Release, ReleaseError
from exporter.runtime import OUTPUTS, RETRY_S, Classifier, Prepared, Session
from exporter.trace_cache import user_cache
from tests.test_onnx import FACTS, PREPROCESS, SIZE, Toy


class State:
    """A state folder as the agent leaves it: numbered commits with a release, CURRENT replaced by a rename."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = 0
        self._exporter = OnnxExporter(max_batch=4, traces=user_cache())

    def commit(self, module: Toy, preprocess: Preprocess = PREPROCESS) -> Release:
        self.commits += 1
        folder = self.path / "commits" / f"{self.commits:06d}" / "release"
        images = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
        release = self._exporter.release(module, preprocess, FACTS, folder, images)
        self.point(self.commits)
        return release

    def point(self, number: int) -> None:
        link = self.path / "CURRENT.new"
        link.symlink_to(f"commits/{number:06d}")
        link.rename(self.path / "CURRENT")


@pytest.fixture(scope="module")
def two_releases(tmp_path_factory) -> State:
    """Commit 1 knows five classes, commit 2 seven; tests move CURRENT between them."""
    state = State(tmp_path_factory.mktemp("state"))
    state.commit(Toy(5, seed=1))
    state.commit(Toy(7, seed=2))
    return state


@pytest.fixture
def state(two_releases) -> State:
    two_releases.point(1)
    return two_releases


class Clock:
    """The time by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runtime, "time", clock)
    return clock


def picture(seed: int, width: int = 40, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_answers_are_the_models_sorted_by_probability(state):
    images = [picture(seed) for seed in range(3)]
    classifier = Classifier(state.path)

    predictions = classifier.classify([png(images[0]), images[1], png(images[2])], top=0)

    module = Toy(5, seed=1)
    _, _, expected = module(torch.from_numpy(PREPROCESS.batch(images)))
    for prediction, row in zip(predictions, expected, strict=True):
        order = row.argsort(descending=True).tolist()
        assert prediction.labels == tuple(module.classes[index] for index in order)
        np.testing.assert_allclose(prediction.scores, row[order].numpy(), atol=1e-5)
        assert prediction.release == classifier.release.id


def test_a_large_jpeg_is_answered_as_one_that_was_prepared_like_those_that_were_learned(state):
    buffer = io.BytesIO()
    picture(0, 300, 400).save(buffer, "JPEG", quality=90)
    with closing(Decoders(10**6, workers=1)) as decoders:
        [pixels] = decoders.pixels([buffer.getvalue()], PREPROCESS)
    classifier = Classifier(state.path)

    encoded, prepared, whole = classifier.classify(
        [buffer.getvalue(), Prepared(pixels, PREPROCESS), Image.open(buffer)], top=0
    )

    assert encoded == prepared
    assert encoded != whole  # its own pixels: those of a Pillow image are all taken


def test_a_release_that_was_made_with_all_pixels_of_a_jpeg_keeps_its_id_and_is_answered_so(tmp_path):
    state = State(tmp_path)
    older = replace(PREPROCESS, jpeg_oversampling=0)
    folder = state.commit(Toy(5), older).path
    release = json.loads((folder / "release.json").read_text())
    buffer = io.BytesIO()
    picture(0, 300, 400).save(buffer, "JPEG", quality=90)

    classifier = Classifier(tmp_path)

    assert "jpeg_oversampling" not in release["preprocess"]
    assert classifier.release.id == release["id"] and classifier.release.preprocess == older
    encoded, whole = classifier.classify([buffer.getvalue(), Image.open(buffer)], top=0)
    assert encoded == whole


def test_only_the_first_classes_are_listed_and_fewer_when_there_are_fewer(state):
    classifier = Classifier(state.path)

    assert len(classifier.classify([picture(0)], top=2)[0].labels) == 2
    assert len(classifier.classify([picture(0)], top=9)[0].labels) == 5
    assert classifier.classify([]) == []


def test_more_images_than_a_batch_are_answered_one_by_one_the_same(state):
    images = [picture(seed) for seed in range(7)]
    classifier = Classifier(state.path, max_batch=3)

    together = classifier.classify(images)
    alone = [classifier.classify([image])[0] for image in images]

    for a, b in zip(together, alone, strict=True):
        assert a.labels == b.labels
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)


def test_an_unusable_image_is_an_error_with_its_reason(state):
    with pytest.raises(ImageError) as caught:
        Classifier(state.path).classify([b"no image"])
    assert caught.value.reason == "unsupported_format"

    with pytest.raises(ImageError) as caught:
        Classifier(state.path, max_pixels=100).classify([png(picture(0))])
    assert caught.value.reason == "bomb"


def test_a_release_folder_can_be_served_directly(state):
    folder = releases.current(state.path)

    classifier = Classifier(folder)

    assert classifier.release.path == folder
    assert not classifier.refresh()


def test_a_new_release_is_taken_up_and_an_older_one_again(state):
    classifier = Classifier(state.path)
    assert not classifier.refresh()

    state.point(2)
    assert classifier.refresh()
    assert len(classifier.release.classes) == len(classifier.classify([picture(0)], top=0)[0].labels) == 7

    state.point(1)
    assert classifier.refresh()
    assert len(classifier.release.classes) == 5


def test_a_commit_that_keeps_its_predecessors_release_swaps_nothing(state, tmp_path):
    state = State(tmp_path)
    state.commit(Toy(5, seed=1))
    classifier = Classifier(state.path)
    (tmp_path / "commits" / "000002").mkdir()
    (tmp_path / "commits" / "000002" / "release").symlink_to("../000001/release")
    state.point(2)

    assert not classifier.refresh()


def takes_up_seven_classes(classifier: Classifier) -> None:
    deadline = time.monotonic() + 20
    while len(classifier.release.classes) != 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(classifier.release.classes) == 7


def test_the_follower_takes_up_a_new_release_by_itself(state):
    classifier = Classifier(state.path)
    classifier.follow(interval_s=0.01)
    try:
        state.point(2)
        takes_up_seven_classes(classifier)
    finally:
        classifier.close()


def test_the_follower_outlives_a_folder_that_cannot_be_read_for_a_while(state, monkeypatch, caplog):
    classifier = Classifier(state.path)
    failed = threading.Event()

    def broken(path: Path) -> bool:
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(Path, "exists", broken)
        classifier.follow(interval_s=0.01)
        assert failed.wait(20)
    try:
        state.point(2)
        takes_up_seven_classes(classifier)
        assert "it cannot be read ([Errno 5] Input/output error)" in caplog.text
    finally:
        classifier.close()


def test_a_smaller_form_is_served_where_the_release_has_it(tmp_path, caplog):
    images = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    exporter = OnnxExporter(max_batch=4, precisions=("fp16",), traces=user_cache())
    exporter.release(Toy(5), PREPROCESS, FACTS, tmp_path / "release", images)
    asked = [picture(seed) for seed in range(3)]
    full = Classifier(tmp_path / "release").classify(asked, top=0)

    for precision, warns in (("fp16", False), ("int8", True)):
        predictions = Classifier(tmp_path / "release", precision=precision).classify(asked, top=0)
        for prediction, want in zip(predictions, full, strict=True):
            assert prediction.labels == want.labels
            np.testing.assert_allclose(prediction.scores, want.scores, atol=1e-2)
        assert ("it is served in fp32" in caplog.text) == warns


def damage_model(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


def truncate_model(folder: Path) -> None:
    """A model that was never whole: its hash is right, onnxruntime cannot open it."""
    (folder / "model.onnx").write_bytes(b"not a model")
    rehash(folder)


def falsify_golden(folder: Path) -> None:
    with np.load(folder / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["embedding"] = arrays["embedding"] + np.float32(0.1)
    np.savez(folder / "golden.npz", **arrays)
    rehash(folder)


def rehash(folder: Path, **changes: Any) -> None:
    """Write release.json anew, with hashes that fit what is there."""
    release = replace(releases.read(folder), **changes)
    releases.write(replace(release, files={name: releases.digest(folder / name) for name in release.files}))


def edit(folder: Path, **changes: Any) -> None:
    """Change values of release.json and nothing else."""
    values = json.loads((folder / "release.json").read_text())
    (folder / "release.json").write_text(json.dumps(values | changes))


def reverse_names(folder: Path) -> None:
    edit(folder, classes=releases.read(folder).classes[::-1])


def reverse_names_and_rehash(folder: Path) -> None:
    rehash(folder, classes=releases.read(folder).classes[::-1])


def another_mean(folder: Path) -> None:
    edit(folder, preprocess=replace(PREPROCESS, mean=(0.4, 0.4, 0.4)).to_dict())


def nest_deeply(folder: Path) -> None:
    (folder / "release.json").write_text("[" * 100_000)


def pipe_for_a_manifest(folder: Path) -> None:
    (folder / "release.json").unlink()
    os.mkfifo(folder / "release.json")


def pipe_for_a_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


def huge_manifest(folder: Path) -> None:
    with (folder / "release.json").open("r+b") as file:
        file.truncate(releases.MAX_MANIFEST_BYTES + 1)


def lead_out(folder: Path) -> None:
    values = json.loads((folder / "release.json").read_text())
    edit(folder, files={"../model.onnx": [1, "00"], **values["files"]}, sha256=None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_model, "it is damaged"),
        (truncate_model, "cannot be run"),
        (falsify_golden, "fails its own test"),
        (lambda folder: (folder / "release.json").unlink(), r"release\.json is missing"),
        (reverse_names, "it is damaged: its hash"),
        (reverse_names_and_rehash, "classes in release.json are not those"),
        (another_mean, "it is damaged: its hash"),
        (lambda folder: rehash(folder, preprocess=replace(PREPROCESS, mean=(0.4, 0.4, 0.4))), "preprocess"),
        (lambda folder: rehash(folder, classes=("a", "b", "c")), "classes in release.json are not those"),
        (lambda folder: edit(folder, classes="abcdefg", sha256=None), "expected a list of names"),
        (lambda folder: edit(folder, created="long ago", sha256=None), "long ago"),
        (nest_deeply, "cannot be read .*recursion"),
        (pipe_for_a_manifest, "not a regular file"),
        (pipe_for_a_model, "not a regular file"),
        (huge_manifest, "more than 67108864 bytes"),
        (lead_out, "expected a name without a folder"),
    ],
)
def test_a_bad_release_is_refused_at_the_start_and_never_replaces_a_good_one(spoil, message, tmp_path, clock):
    # Given a good release that serves and a spoilt one after it
    state = State(tmp_path)
    state.commit(Toy(5, seed=1))
    classifier = Classifier(state.path)
    spoil(state.commit(Toy(7, seed=2)).path)

    # When it is to be taken up
    with pytest.raises(ReleaseError, match=message):
        classifier.refresh()

    # Then the good one goes on, the bad one is not tried again at once, and nobody can start from it
    assert len(classifier.classify([picture(0)], top=0)[0].labels) == 5
    assert not classifier.refresh()
    with pytest.raises(ReleaseError, match=message):
        Classifier(state.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("a", "b", "c")}, "names 3 classes, and its model answers for 7"),
        ({"preprocess": replace(PREPROCESS, mean=(0.47, 0.5, 0.5))}, "preprocessed otherwise than where it was made"),
        ({"preprocess": replace(PREPROCESS, std=(0.3, 0.3, 0.3))}, "preprocessed otherwise than where it was made"),
    ],
)
def test_a_model_without_a_description_is_held_to_its_golden_set_alone(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "metadata", {})
    release = State(tmp_path).commit(Toy(7))
    Classifier(release.path)
    rehash(release.path, **changes)
    with pytest.raises(ReleaseError, match=message):
        Classifier(release.path)


@pytest.mark.parametrize(
    "other",
    [
        replace(PREPROCESS, mean=(0.47, 0.5, 0.5)),
        replace(PREPROCESS, resize_mode="squash"),
        replace(PREPROCESS, resize_mode="longest"),
        replace(PREPROCESS, interpolation="bilinear"),
    ],
    ids=["another mean", "squashed", "padded", "another resampling"],
)
@pytest.mark.parametrize("size", [32, 224])
def test_the_golden_set_finds_another_preprocessing(other, size):
    ours, other = replace(PREPROCESS, size=size), replace(other, size=size)
    files = golden.encoded()
    arrays = {**files, golden.PIXELS: golden.pixels(files, ours)}
    assert golden.difference(arrays, ours) == 0
    assert golden.difference(arrays, other) > golden.PIXEL_ATOL
    arrays[golden.PIXELS] = arrays[golden.PIXELS][:, ::-1]  # blue first
    assert golden.difference(arrays, ours) > golden.PIXEL_ATOL


def test_a_release_of_an_older_version_is_loaded_and_says_so_once(tmp_path, caplog):
    # given one without a hash of release.json and without encoded images
    state = State(tmp_path)
    folder = state.commit(Toy(5)).path
    with np.load(folder / "golden.npz") as arrays:
        np.savez(folder / "golden.npz", **{name: arrays[name] for name in ("images", *OUTPUTS)})
    rehash(folder)
    values = json.loads((folder / "release.json").read_text())
    del values["sha256"]
    (folder / "release.json").write_text(json.dumps(values))
    model = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()

    # when
    classifier = Classifier(tmp_path)
    for _ in range(3):
        classifier.refresh()

    # then it keeps the id it had
    assert classifier.release.id == hashlib.sha256(f"model.onnx {model}".encode()).hexdigest()[:12]
    assert caplog.text.count("is of an older version") == 1
    caplog.clear()
    state.commit(Toy(6))
    assert classifier.refresh() and "older version" not in caplog.text


def test_releases_are_told_apart_by_what_is_in_them_not_by_their_folder(tmp_path):
    # given a folder served by its own path
    state = State(tmp_path)
    first, second = state.commit(Toy(5, seed=1)).path, state.commit(Toy(7, seed=2)).path
    classifier = Classifier(first)

    # when another release takes its place
    shutil.rmtree(first)
    second.rename(first)

    # then
    assert classifier.refresh() and len(classifier.release.classes) == 7
    assert not classifier.refresh()


def test_a_release_that_could_not_be_used_is_tried_again_after_longer_and_longer_pauses(tmp_path, clock):
    # given a good one, and one after it that is still being copied
    state = State(tmp_path)
    state.commit(Toy(5, seed=1))
    classifier = Classifier(state.path)
    model = state.commit(Toy(7, seed=2)).path / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:1000])

    # when it is looked for every half second
    tried = []
    for look in range(600):
        clock.now = look / 2
        try:
            assert not classifier.refresh()
        except ReleaseError:
            tried.append(clock.now)
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert "model.onnx has 1000 bytes" in classifier.why_behind and classifier.behind_s == clock.now

    # and when it is whole
    model.write_bytes(whole)
    clock.now += RETRY_S

    # then
    assert classifier.refresh() and len(classifier.release.classes) == 7
    assert (classifier.why_behind, classifier.behind_s) == ("", 0)


def test_a_good_release_is_taken_up_at_once_after_a_bad_one(tmp_path, clock):
    state = State(tmp_path)
    state.commit(Toy(5, seed=1))
    classifier = Classifier(state.path)
    damage_model(state.commit(Toy(7, seed=2)).path)
    with pytest.raises(ReleaseError):
        classifier.refresh()
    state.commit(Toy(6, seed=3))
    assert classifier.refresh() and len(classifier.release.classes) == 6


@pytest.mark.parametrize("error", [ReleaseError("damaged"), RecursionError("too deep"), MemoryError(), OSError("disk")])
def test_no_exception_ends_the_follower(state, monkeypatch, error):
    classifier = Classifier(state.path)
    failed = threading.Semaphore(0)

    def broken(path: Path) -> Path:
        failed.release()
        raise error

    with monkeypatch.context() as broken_for_a_while:
        broken_for_a_while.setattr(releases, "current", broken)
        classifier.follow(interval_s=0.01)
        assert all(failed.acquire(timeout=20) for _ in range(3))
        assert classifier.why_not_alive() == [] and classifier.why_behind
    try:
        state.point(2)
        takes_up_seven_classes(classifier)
    finally:
        classifier.close()
    assert classifier.why_not_alive() == []


def test_the_same_model_makes_the_same_release(tmp_path):
    first, second = (State(tmp_path / name).commit(Toy(5, seed=1)) for name in "ab")
    assert first.id == second.id and first.files == second.files
    said = [json.loads((release.path / "release.json").read_text()) for release in (first, second)]
    differ = {key for key in said[0] if said[0][key] != said[1][key]}
    assert differ <= {"created", "seconds", "sha256"}


def test_a_state_folder_without_a_release_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ReleaseError, match="no release in"):
        Classifier(tmp_path)


def test_swapping_under_load_fails_and_mixes_nothing(state):
    # Given four clients that check every answer against both releases
    images = [png(picture(seed)) for seed in range(3)]
    classifier = Classifier(state.path, threads=1)
    expected = {}
    for number in (2, 1):
        state.point(number)
        alone = Classifier(state.path, threads=1)
        expected[alone.release.id] = alone.classify(images, top=0)
    stop, wrong, answers = threading.Event(), [], []

    def client() -> None:
        try:
            while not stop.is_set():
                got = classifier.classify(images, top=0)
                answers.append(got[0].release)
                for prediction, want in zip(got, expected[got[0].release], strict=True):
                    same = prediction.release == want.release and prediction.labels == want.labels
                    if not (same and np.allclose(prediction.scores, want.scores, atol=1e-6)):
                        wrong.append((prediction, want))
        except Exception as error:
            wrong.append(error)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()

    # When the release changes twenty times
    swaps = 0
    for turn in range(20):
        state.point(2 - turn % 2)
        swaps += classifier.refresh()
        time.sleep(0.02)
    stop.set()
    for thread in clients:
        thread.join()

    # Then every answer came whole from one of the two
    assert swaps == 20
    assert wrong == []
    assert set(answers) == set(expected)


def test_fifty_swaps_leave_no_memory_behind(state):
    classifier = Classifier(state.path, threads=1)
    process = psutil.Process()
    resident = []
    for turn in range(50):
        state.point(2 - turn % 2)
        assert classifier.refresh()
        classifier.classify([picture(0)])
        resident.append(process.memory_info().rss)

    assert resident[-1] <= 1.15 * resident[4]


def test_serving_imports_no_torch_and_stays_quiet(state):
    program = (
        "import sys; from exporter.runtime import Classifier; "
        f"c = Classifier(__import__('pathlib').Path({str(state.path)!r})); "
        "from PIL import Image; c.classify([Image.new('RGB', (9, 9))]); "
        "print(c.provider, *sorted({'torch', 'open_clip', 'timm', 'agent', 'streams'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )

    assert done.stdout == "CPUExecutionProvider\n" and done.stderr == ""
