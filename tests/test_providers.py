"""Providers that are asked for answer where they can and are right; else the device does, and says so.

onnxruntime itself is faked where a provider is not installed: what is asked of it, and what it answers.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from exporter import providers
from exporter.fastest import LARGER_BATCH
from exporter.onnx import GOLDEN_IMAGES, OnnxExporter
from exporter.providers import GOLDEN_BATCH, KEPT_ENGINES, USUAL_BATCH
from exporter.runtime import Classifier
from exporter.session import CUDA
from exporter.trace_cache import user_cache
from tests.test_onnx import FACTS, PREPROCESS, SIZE, Toy, native_tower
from tests.test_runtime import picture

TENSORRT, OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"


class Provider:
    """An onnxruntime that has a provider more: what it was asked for, and a session of the CPU under its name."""

    SessionOptions = onnxruntime.SessionOptions
    __version__ = onnxruntime.__version__

    def __init__(self, *names: str, shift: float = 0.0, loads: bool = True, fails: str = "") -> None:
        """`shift`: what is added to its answers; `loads`: whether its libraries are there; `fails`: its error."""
        self._names, self._shift, self._loads, self._fails = names, shift, loads, fails
        self.asked: list[tuple[list[Any], dict[str, Any]]] = []

    def get_available_providers(self) -> list[str]:
        return [*self._names, "CPUExecutionProvider"]

    def InferenceSession(self, model: Path, options: Any, providers: list[Any], **more: Any) -> Opened:
        self.asked.append((providers, more))
        if self._fails:
            raise RuntimeError(self._fails)
        name = providers[0][0] if self._loads else "CPUExecutionProvider"
        return Opened(
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), name, self._shift
        )


class Opened:
    """A session of the CPU that says it is another one."""

    def __init__(self, session: onnxruntime.InferenceSession, name: str, shift: float) -> None:
        self._session, self._name, self._shift = session, name, shift

    def get_providers(self) -> list[str]:
        return [self._name, "CPUExecutionProvider"]

    def get_modelmeta(self) -> Any:
        return self._session.get_modelmeta()

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[np.ndarray]:
        return [values + np.float32(self._shift) for values in self._session.run(outputs, inputs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("providers") / "release"
    images = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    exporter = OnnxExporter(max_batch=4, precisions=("fp16", "int8"), traces=user_cache())
    torch.manual_seed(0)
    exporter.release(Toy(5, native_tower()), PREPROCESS, FACTS, folder, images)
    return folder


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Installs a fake onnxruntime beside a GPU that can be used, and a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(providers, "cuda_usable", lambda: True)

    def install(*names: str, **how: Any) -> Provider:
        found = Provider(*names, **how)
        monkeypatch.setattr(providers, "onnxruntime", found)
        return found

    return install


def engines(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "gapstream" / "engines").glob("*"))


def test_the_first_provider_that_is_installed_answers_and_the_ones_before_are_named(folder, installed, caplog):
    runtime = installed(OPENVINO)
    classifier = Classifier(folder, 1, device="cpu", providers=["tensorrt", "openvino:GPU"])

    assert classifier.provider == OPENVINO
    assert classifier.classify([picture(0)]) == Classifier(folder, 1, device="cpu").classify([picture(0)])
    [why] = classifier.passed_over
    assert why.startswith("tensorrt does not answer release ")
    assert why.endswith(f"has no {TENSORRT}, only {OPENVINO}, CPUExecutionProvider")
    assert why in caplog.text
    options = {"device_type": "GPU", "precision": "ACCURACY", "num_of_threads": 1}
    # Without the fallback, onnxruntime raises what went wrong instead of printing it.
    assert runtime.asked == [([(OPENVINO, options), "CPUExecutionProvider"], {"enable_fallback": 0})]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"shift": 0.01}, f"fails its own test on {OPENVINO}: golden answers differ by 0.01"),
        ({"shift": float("nan")}, f"fails its own test on {OPENVINO}: golden answers differ by nan"),
        ({"fails": "no such device"}, "no such device"),
        ({"loads": False}, f"could not load {OPENVINO} and would answer on CPUExecutionProvider"),
    ],
    ids=["answers wrongly", "answers nothing", "raises", "is not loaded"],
)
def test_a_provider_that_cannot_be_used_or_answers_wrongly_does_not_answer(folder, installed, caplog, how, says):
    installed(OPENVINO, **how)
    classifier = Classifier(folder, 1, device="cpu", providers=["openvino"])

    assert classifier.provider == "CPUExecutionProvider"
    [why] = classifier.passed_over
    assert says in why and why in caplog.text


def test_tensorrt_is_told_its_batches_and_keeps_its_engines_by_model(folder, installed, tmp_path):
    runtime = installed(TENSORRT)
    for precision, largest in (("fp32", 32), ("fp32", 2), ("fp16", 32), ("fp32", 32)):
        classifier = Classifier(folder, device="cpu", providers=["tensorrt"], precision=precision, max_batch=largest)
        assert (classifier.provider, classifier.precision) == (TENSORRT, precision)

    found = [wanted for wanted, _ in runtime.asked]
    assert [names[1:] for names in found] == [[("CUDAExecutionProvider", CUDA), "CPUExecutionProvider"]] * 4
    full, small, half, again = (names[0][1] for names in found)
    assert full == again and len(engines(tmp_path)) == 3
    shape = f"3x{SIZE}x{SIZE}"
    assert (full["trt_profile_min_shapes"], full["trt_profile_max_shapes"]) == (
        f"images:1x{shape}",
        f"images:32x{shape}",
    )
    # An own test with more images than the engine takes would have it built anew.
    assert small["trt_profile_max_shapes"] == f"images:4x{shape}" == small["trt_profile_opt_shapes"]
    assert (full["trt_fp16_enable"], half["trt_fp16_enable"]) == (False, True)
    assert len({one["trt_engine_cache_path"] for one in (full, small, half)}) == 3
    assert full["trt_timing_cache_path"] == half["trt_timing_cache_path"] == str(tmp_path / "gapstream" / "engines")


def test_engines_of_a_model_that_failed_are_built_anew_and_few_are_kept(folder, installed, tmp_path):
    installed(TENSORRT, shift=1.0)
    assert Classifier(folder, device="cpu", providers=["tensorrt"]).provider == "CPUExecutionProvider"
    assert engines(tmp_path) == []

    installed(TENSORRT)
    for batch in range(5, 8 + KEPT_ENGINES):
        before = engines(tmp_path)
        Classifier(folder, device="cpu", providers=["tensorrt"], max_batch=batch)
        [new] = set(engines(tmp_path)) - set(before)
        os.utime(new, (batch, batch))

    assert sorted(path.stat().st_mtime for path in engines(tmp_path)) == [*range(8, 8 + KEPT_ENGINES)]


def test_a_cache_that_cannot_be_written_costs_the_engines_alone(folder, installed, tmp_path, caplog):
    (tmp_path / "gapstream").write_text("no folder")
    runtime = installed(TENSORRT)

    assert Classifier(folder, device="cpu", providers=["tensorrt"]).provider == TENSORRT
    assert not any("cache" in name for name in runtime.asked[0][0][0][1])
    assert "engines are not kept" in caplog.text


def test_what_is_made_for_cpus_is_left_to_the_cpu(folder, installed):
    runtime = installed(OPENVINO)
    classifier = Classifier(folder, 1, device="cpu", providers=["openvino"], precision="int8")

    assert (classifier.precision, classifier.provider, runtime.asked) == ("int8", "CPUExecutionProvider", [])
    assert classifier.passed_over[0].endswith("int8 is made for onnxruntime's own CPU kernels")


def test_tensorrt_without_a_gpu_and_an_unknown_name_are_said(folder, installed, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    installed(TENSORRT)
    monkeypatch.setattr(providers, "cuda_usable", lambda: False)
    classifier = Classifier(folder, device="cpu", providers=["tensorrt", "tpu"])

    assert classifier.provider == "CPUExecutionProvider"
    assert [why.rpartition(": ")[2] for why in classifier.passed_over] == [
        "no NVIDIA device can be used",
        "it is not known; expected tensorrt, openvino or, say, openvino:GPU",
    ]


def test_the_batches_that_are_named_twice_are_the_same():
    assert (GOLDEN_BATCH, USUAL_BATCH) == (GOLDEN_IMAGES, LARGER_BATCH)


@pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(), reason="onnxruntime-openvino is not installed"
)
def test_openvino_answers_as_the_trained_model(folder):
    classifier = Classifier(folder, 1, providers=["openvino"])

    assert (classifier.provider, classifier.passed_over) == (OPENVINO, ())
