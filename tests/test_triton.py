"""Releases in a Triton model repository: whole versions, the newest kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter import onnx as exporting
from exporter import triton
from exporter.onnx import OnnxExporter
from exporter.release import Release
from exporter.trace_cache import user_cache
from tests.test_onnx import FACTS, PREPROCESS, SIZE, Toy

IMAGES = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    folder = tmp_path_factory.mktemp("made") / "release"
    return OnnxExporter(max_batch=4, precisions=("fp16",), traces=user_cache()).release(
        Toy(5), PREPROCESS, FACTS, folder, IMAGES
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_published_version_has_model_labels_and_configuration(release, tmp_path):
    folder = triton.publish(release, tmp_path, "clip", 7)

    assert folder == tmp_path / "clip" / "7"
    assert files(folder) == {"model.onnx", "golden.npz", "release.json", "labels.txt"}
    assert (folder / "labels.txt").read_text(encoding="utf-8").splitlines() == list(release.classes)
    config = (tmp_path / "clip" / "config.pbtxt").read_text()
    assert 'name: "clip"' in config and 'backend: "onnxruntime"' in config and "max_batch_size: 64" in config
    outputs = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"images": IMAGES})
    assert outputs[2].shape == (3, 5)


def test_only_the_newest_versions_are_kept_by_number(release, tmp_path):
    for version in (8, 9, 10, 11):
        triton.publish(release, tmp_path, "clip", version, keep=2)

    assert triton.versions(tmp_path, "clip") == [10, 11]
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {"config.pbtxt", "10", "11"}


def test_publishing_again_after_a_crash_leaves_one_whole_version(release, tmp_path):
    # Given what processes leave that died while staging and while deleting
    (tmp_path / "clip" / ".old-1").mkdir(parents=True)
    (tmp_path / "clip" / ".staging-3").mkdir()
    (tmp_path / "clip" / ".staging-3" / "model.onnx").write_bytes(b"half")

    first = triton.publish(release, tmp_path, "clip", 3)
    before = (first / "model.onnx").stat()
    again = triton.publish(release, tmp_path, "clip", 3)

    assert again == first and (again / "model.onnx").stat() == before
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {"config.pbtxt", "3"}


def test_a_version_outlives_the_release_it_was_made_from(release, tmp_path):
    made = tmp_path / "release"
    shutil.copytree(release.path, made)

    folder = triton.publish(Release(**{**vars(release), "path": made}), tmp_path / "repository", "clip", 1)
    shutil.rmtree(made)

    assert onnxruntime.InferenceSession(folder / "model.onnx")


def test_a_model_of_several_files_becomes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SINGLE_FILE_BYTES", 1000)
    release = OnnxExporter(max_batch=4, traces=user_cache()).release(
        Toy(3), PREPROCESS, FACTS, tmp_path / "release", IMAGES
    )

    folder = triton.publish(release, tmp_path / "repository", "clip", 1)

    assert {"model.onnx/model.onnx", "model.onnx/model.onnx.data", "labels.txt"} <= files(folder)
    assert onnxruntime.InferenceSession(folder / "model.onnx" / "model.onnx")


@pytest.mark.parametrize(("version", "keep"), [(0, 3), (1, 0)])
def test_numbers_out_of_range_are_refused(version, keep, release, tmp_path):
    with pytest.raises(ValueError, match="expected both"):
        triton.publish(release, tmp_path, "clip", version, keep=keep)
