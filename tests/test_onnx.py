"""A release answers as the trained model does, or is not made."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from agent.methods.base import InferenceModule
from exporter import onnx as exporting
from exporter import release as releases
from exporter.onnx import OnnxExporter
from exporter.precision import PRECISIONS, Precision, Tolerance
from exporter.preprocess import Preprocess
from exporter.release import ParityError, ReleaseError
from exporter.runtime import Classifier

SIZE = 32
PREPROCESS = Preprocess(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FACTS = {"method": "toy", "model": {"name": "toy", "sha256": "0" * 64}, "fusion": "calibrated"}


class Toy(InferenceModule):
    """A convolution under text and visual rows per class."""

    class_tensors = ("text", "visual")

    def __init__(self, classes: int, tower: nn.Module | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.classes = tuple(f"class {index} ü" for index in range(classes))
        self.tower = tower or nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16))
        self.register_buffer("text", F.normalize(torch.randn(classes, 16), dim=-1))
        self.register_buffer("visual", F.normalize(torch.randn(classes, 16), dim=-1))
        self.register_buffer("scale", torch.tensor(20.0))
        self.eval().requires_grad_(False)

    def forward(self, images):
        embedding = F.normalize(self.tower(images), dim=-1)
        logits = self.scale * embedding @ self.text.T
        probabilities = (logits.softmax(-1) + (embedding @ self.visual.T).softmax(-1)) / 2
        return embedding, logits, probabilities


def native_tower() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).visual


def timm_tower() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=SIZE, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=16)


@pytest.fixture(scope="module")
def exporter() -> OnnxExporter:
    """Shared: what was traced for one test need not be traced for the next."""
    return OnnxExporter(max_batch=20)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 3, SIZE, SIZE)).astype(np.float32)


def answers(release, images):
    return onnxruntime.InferenceSession(release.model).run(None, {"images": images})


def assert_answers_like(release, module, images):
    with torch.no_grad():
        expected = module(torch.from_numpy(images))
    for got, want in zip(answers(release, images), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5)


@pytest.mark.parametrize("tower", [native_tower, timm_tower])
def test_a_released_transformer_answers_like_torch_at_any_batch_size(tower, tmp_path, images):
    torch.manual_seed(0)
    module = Toy(5, tower())

    release = OnnxExporter(max_batch=8).release(module, PREPROCESS, FACTS, tmp_path / "release", images)

    for size in (1, 2, 3, 7):
        assert_answers_like(release, module, images[:size])
    assert release.parity.batches == (1, 3, 8) and release.parity.top1 == 1 and release.parity.embedding < 1e-5
    onnx.checker.check_model(str(release.model), full_check=True)


def test_later_releases_reuse_the_trace_with_other_weights_and_more_classes(exporter, tmp_path, images):
    # Given one release
    exporter.release(Toy(4), PREPROCESS, FACTS, tmp_path / "first", images)

    # When models with every number changed and other numbers of classes follow
    for classes in (4, 5, 1, 300):
        module = Toy(classes, seed=classes)
        module.scale.fill_(5.0 + classes % 7)
        release = exporter.release(module, PREPROCESS, FACTS, tmp_path / str(classes), images)

        # Then nothing is traced again and the answers are the new model's
        assert release.seconds["trace"] < 0.1
        assert release.classes == module.classes
        assert_answers_like(release, module, images)
        onnx.checker.check_model(str(release.model), full_check=True)


def test_a_first_release_with_a_single_class_serves_later_ones_with_more(tmp_path, images):
    exporter = OnnxExporter(max_batch=4)
    for classes in (1, 6):
        module = Toy(classes)
        release = exporter.release(module, PREPROCESS, FACTS, tmp_path / str(classes), images)
        assert_answers_like(release, module, images)
    assert release.seconds["trace"] < 0.1


def test_another_structure_is_traced_anew(tmp_path, images):
    exporter = OnnxExporter(max_batch=4)
    exporter.release(Toy(3), PREPROCESS, FACTS, tmp_path / "first", images)
    wider = Toy(3, nn.Sequential(nn.Conv2d(3, 9, 8, 8), nn.Flatten(), nn.Linear(144, 16)))

    release = exporter.release(wider, PREPROCESS, FACTS, tmp_path / "second", images)

    assert_answers_like(release, wider, images)


class OutsideTensors(Toy):
    factor = 1.0

    def forward(self, images):
        embedding, logits, probabilities = super().forward(images)
        return embedding, logits * self.factor, probabilities


def test_a_number_kept_outside_the_tensors_is_noticed_and_traced_anew(tmp_path, images):
    exporter = OnnxExporter(max_batch=4)
    exporter.release(OutsideTensors(3), PREPROCESS, FACTS, tmp_path / "first", images)
    changed = OutsideTensors(3)
    changed.factor = 2.0

    release = exporter.release(changed, PREPROCESS, FACTS, tmp_path / "second", images)

    assert_answers_like(release, changed, images)


class BatchDependent(Toy):
    def forward(self, images):
        return super().forward(images - images.mean(dim=0, keepdim=True))


def test_a_prediction_that_depends_on_the_other_images_is_refused_with_numbers_and_leaves_nothing(tmp_path, images):
    with pytest.raises(ParityError, match=r"embeddings differ by \d.*0\.001 is allowed.*not released"):
        OnnxExporter(max_batch=4).release(BatchDependent(3), PREPROCESS, FACTS, tmp_path / "release", images)

    assert list(tmp_path.iterdir()) == []


class DataDependent(Toy):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


def test_a_model_that_torch_cannot_trace_is_refused_with_the_reason(tmp_path, images):
    with pytest.raises(ReleaseError, match=r"cannot trace DataDependent \(.+\); not released"):
        OnnxExporter(max_batch=4).release(DataDependent(3), PREPROCESS, FACTS, tmp_path / "release", images)

    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_finite_is_refused(exporter, tmp_path, images):
    module = Toy(3)
    module.text[1, 0] = float("nan")

    with pytest.raises(ParityError, match=r"logits .* differ by nan"):
        exporter.release(module, PREPROCESS, FACTS, tmp_path / "release", images)


def test_check_images_of_another_shape_are_refused(exporter, tmp_path, images):
    with pytest.raises(ValueError, match=r"got check images of shape \(7, 3, 32, 16\), expected"):
        exporter.release(Toy(3), PREPROCESS, FACTS, tmp_path / "release", images[..., :16])


def test_equal_models_give_equal_bytes_and_ids(exporter, tmp_path, images):
    first, second, other = (
        exporter.release(Toy(3, seed=seed), PREPROCESS, FACTS, tmp_path / name, images)
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )

    assert first.model.read_bytes() == second.model.read_bytes()
    assert first.golden.read_bytes() == second.golden.read_bytes()
    assert first.id == second.id != other.id


def test_the_model_file_alone_tells_labels_preprocessing_and_origin_but_no_paths(exporter, tmp_path, images):
    module = Toy(3)
    release = exporter.release(module, PREPROCESS, FACTS, tmp_path / "release", images)

    metadata = onnxruntime.InferenceSession(release.model).get_modelmeta().custom_metadata_map

    assert tuple(json.loads(metadata["classes"])) == module.classes
    assert Preprocess.from_dict(json.loads(metadata["preprocess"])) == PREPROCESS
    assert metadata["method"] == "toy" and json.loads(metadata["model"]) == FACTS["model"]
    assert b"site-packages" not in release.model.read_bytes()


def test_golden_answers_are_the_trained_models(exporter, tmp_path, images):
    release = exporter.release(Toy(3), PREPROCESS, FACTS, tmp_path / "release", images)

    with np.load(release.golden, allow_pickle=False) as golden:
        assert np.array_equal(golden["images"], images[:4])
        for name, got in zip(("embedding", "logits", "probabilities"), answers(release, images[:4]), strict=True):
            np.testing.assert_allclose(got, golden[name], atol=1e-5)


def test_weights_too_large_for_one_file_are_kept_beside_it(exporter, tmp_path, images, monkeypatch):
    monkeypatch.setattr(exporting, "SINGLE_FILE_BYTES", 1000)
    module = Toy(3)

    release = exporter.release(module, PREPROCESS, FACTS, tmp_path / "release", images)

    assert set(release.files) == {"model.onnx", "model.onnx.data", "golden.npz"}
    assert_answers_like(release, module, images)
    (tmp_path / "release").rename(tmp_path / "elsewhere")
    assert_answers_like(releases.read(tmp_path / "elsewhere"), module, images)


@pytest.fixture(scope="module")
def precise_exporter() -> OnnxExporter:
    return OnnxExporter(max_batch=8, precisions=("fp16", "int8"))


def holdout(module: Toy, images: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images with the answers the model gives: its accuracy on them is 1."""
    return [(images, module(torch.from_numpy(images))[2].argmax(1).numpy())]


def test_smaller_forms_are_released_with_what_was_measured(precise_exporter, tmp_path, images):
    torch.manual_seed(0)
    module = Toy(5, native_tower())

    release = precise_exporter.release(module, PREPROCESS, FACTS, tmp_path / "release", images, holdout(module, images))

    with torch.no_grad():
        expected = module(torch.from_numpy(images))
    for precision in ("fp16", "int8"):
        variant = release.variants[precision]
        assert variant.refused is None and variant.accuracy == variant.accuracy_fp32 == 1
        assert release.offers(precision) and release.model_in(precision).name in release.files
        session = onnxruntime.InferenceSession(release.model_in(precision))
        for size in (1, 3, 7):
            got = session.run(None, {"images": images[:size]})
            for values, want in zip(got, expected, strict=True):
                assert values.dtype == np.float32
                np.testing.assert_allclose(values, want[:size].numpy(), atol=0.02 * float(want.abs().max()))
    assert release.model_in("fp16").stat().st_size < 0.7 * release.model.stat().st_size
    assert releases.read(release.path) == release


def test_a_smaller_form_that_answers_worse_is_left_out_and_the_release_made(
    precise_exporter, tmp_path, images, monkeypatch
):
    # Given that fp16 answers half of the hold-out right, int8 nearly all, and fp32 all
    module = Toy(5, native_tower())
    scores = {"model.fp16.onnx": 0.5, "model.int8.onnx": 0.999, "model.onnx": 1.0}

    class Scored(exporting.Session):
        def __init__(self, model, **options) -> None:
            super().__init__(model, **options)
            self.accuracy = scores[model.name]

    monkeypatch.setattr(exporting, "Session", Scored)
    monkeypatch.setattr(exporting, "_accuracy", lambda session, holdout: session.accuracy)

    release = precise_exporter.release(module, PREPROCESS, FACTS, tmp_path / "release", images, holdout(module, images))

    assert release.variants["fp16"].refused == "accuracy on the hold-out is 50.0%, and 100.0% in fp32"
    assert not release.offers("fp16") and not release.model_in("fp16").exists()
    assert release.offers("int8") and release.offers("fp32")
    assert releases.read(release.path) == release


def test_a_fault_of_the_machine_is_raised_and_leaves_no_smaller_form_out(
    precise_exporter, tmp_path, images, monkeypatch
):
    def full(model, path, limit) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(PRECISIONS, "fp16", replace(PRECISIONS["fp16"], convert=full))
    with pytest.raises(OSError, match="No space left"):
        precise_exporter.release(Toy(5, native_tower()), PREPROCESS, FACTS, tmp_path / "release", images)


def test_a_smaller_form_beyond_its_tolerance_is_left_out(precise_exporter, tmp_path, images, monkeypatch):
    strict = Tolerance(atol=1e-9, logits=1e-9, cosine=1, top1=1)
    monkeypatch.setitem(PRECISIONS, "fp16", replace(PRECISIONS["fp16"], tolerance=strict))

    release = precise_exporter.release(Toy(5, native_tower()), PREPROCESS, FACTS, tmp_path / "release", images)

    assert "embeddings differ by" in release.variants["fp16"].refused
    assert "model.fp16.onnx" not in release.files and "model.int8.onnx" in release.files


def test_a_precision_is_one_entry_of_the_table(tmp_path, images, monkeypatch):
    def convert(source, target, single_file_bytes):
        shutil.copyfile(source, target)

    exact = Tolerance(atol=1e-3, logits=1e-3, cosine=0.9999, top1=1)
    monkeypatch.setitem(PRECISIONS, "same", Precision(convert, exact, cpu_only=True, suits="tests"))
    module = Toy(3)

    release = OnnxExporter(max_batch=4, precisions=("same",)).release(
        module, PREPROCESS, FACTS, tmp_path / "release", images
    )

    assert release.offers("same") and release.variants["same"].parity.provider == "CPUExecutionProvider"
    served = Classifier(tmp_path / "release", precision="same")
    assert len(served.classify([Image.new("RGB", (9, 9))], top=0)[0].labels) == 3


def test_the_table_of_precisions_is_read_without_what_converts():
    code = "import exporter.precision, sys; print({'numpy', 'onnx', 'onnxruntime', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


def test_an_unknown_precision_is_refused_at_once():
    with pytest.raises(ValueError, match=r"got precisions \['fp8'\], expected some of fp16, int8"):
        OnnxExporter(precisions=("fp8", "int8"))


def test_a_release_is_read_back_as_it_was_made(exporter, tmp_path, images):
    release = exporter.release(Toy(3), PREPROCESS, FACTS, tmp_path / "release", images)

    assert releases.read(tmp_path / "release") == release
    release.verify()


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_damaged_release_is_noticed(name, exporter, tmp_path, images):
    release = exporter.release(Toy(3), PREPROCESS, FACTS, tmp_path / "release", images)
    path = release.path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(ReleaseError, match=f"{name} has .* it is damaged"):
        release.verify()

    path.unlink()
    with pytest.raises(ReleaseError, match=f"{name} cannot be read"):
        release.verify()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99}', '{"format": 1, "id": "x", "parity": {}}'])
def test_a_manifest_that_is_no_release_is_refused(content, tmp_path):
    (tmp_path / "release.json").write_text(content)

    with pytest.raises(ReleaseError, match=r"release\.json"):
        releases.read(tmp_path)


def test_the_current_release_is_found_behind_the_state_folders_link(exporter, tmp_path, images):
    commit = tmp_path / "state" / "commits" / "000002"
    commit.mkdir(parents=True)
    release = exporter.release(Toy(3), PREPROCESS, FACTS, commit / "release", images)
    state = tmp_path / "state"

    with pytest.raises(ReleaseError, match="neither"):
        releases.current(state)
    (state / "CURRENT").symlink_to("commits/000002")

    assert releases.current(state) == releases.current(release.path) == release.path.resolve()

    # Given a later commit that has kept the earlier release by a link
    later = tmp_path / "state" / "commits" / "000003"
    later.mkdir()
    (state / "CURRENT").unlink()
    (state / "CURRENT").symlink_to("commits/000003")
    with pytest.raises(ReleaseError, match="000003 has none"):
        releases.current(state)
    (later / "release").symlink_to("../000002/release")
    assert releases.current(state) == release.path.resolve()
