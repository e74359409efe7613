"""The runtime answers from the current release, follows it under load, and needs no torch."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from exporter import release as releases
from exporter.onnx import OnnxExporter
from exporter.preprocess import ImageError
from exporter.release import Release, ReleaseError
from exporter.runtime import Classifier
from tests.test_onnx import FACTS, PREPROCESS, SIZE, Toy


class State:
    """A state folder as the agent leaves it: numbered commits with a release, CURRENT replaced by a rename."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = 0
        self._exporter = OnnxExporter(max_batch=4)

    def commit(self, module: Toy) -> Release:
        self.commits += 1
        folder = self.path / "commits" / f"{self.commits:06d}" / "release"
        images = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
        release = self._exporter.release(module, PREPROCESS, FACTS, folder, images)
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


def test_the_follower_takes_up_a_new_release_by_itself(state):
    classifier = Classifier(state.path)
    classifier.follow(interval_s=0.01)
    try:
        state.point(2)
        deadline = time.monotonic() + 20
        while len(classifier.release.classes) != 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(classifier.release.classes) == 7
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
        deadline = time.monotonic() + 20
        while len(classifier.release.classes) != 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(classifier.release.classes) == 7
        assert "it cannot be read ([Errno 5] Input/output error)" in caplog.text
    finally:
        classifier.close()


def test_a_smaller_form_is_served_where_the_release_has_it(tmp_path, caplog):
    images = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    exporter = OnnxExporter(max_batch=4, precisions=("fp16",))
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


def rehash(folder: Path) -> None:
    release = releases.read(folder)
    releases.write(replace(release, files={name: releases.digest(folder / name) for name in release.files}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_model, "it is damaged"),
        (truncate_model, "cannot be run"),
        (falsify_golden, "fails its own test"),
        (lambda folder: (folder / "release.json").unlink(), r"release\.json is missing"),
    ],
)
def test_a_bad_release_is_refused_at_the_start_and_never_replaces_a_good_one(spoil, message, tmp_path):
    # Given a good release that serves and a spoilt one after it
    state = State(tmp_path)
    state.commit(Toy(5, seed=1))
    classifier = Classifier(state.path)
    spoil(state.commit(Toy(7, seed=2)).path)

    # When it is to be taken up
    with pytest.raises(ReleaseError, match=message):
        classifier.refresh()

    # Then the good one goes on, the bad one is not tried again, and nobody can start from it
    assert len(classifier.classify([picture(0)], top=0)[0].labels) == 5
    assert not classifier.refresh()
    with pytest.raises(ReleaseError, match=message):
        Classifier(state.path)


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
