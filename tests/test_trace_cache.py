"""A graph is traced once on a machine: what is kept is used where it fits, and whatever is wrong with it is a miss."""

from __future__ import annotations

import errno
import os
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from exporter import trace, trace_cache
from exporter.onnx import OnnxExporter
from exporter.release import Release
from exporter.trace import tensors_of
from exporter.trace_cache import MAX_BYTES, MAX_CONSTANT_BYTES, MAX_ENTRIES, TraceCache, key_of, user_cache
from tests.test_onnx import FACTS, PREPROCESS, SIZE, OutsideTensors, Toy, assert_answers_like

IMAGES = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)


def released(module: Toy, folder: Path, cache: TraceCache | None) -> Release:
    """A release as the first of a process makes it."""
    return OnnxExporter(max_batch=4, traces=cache).release(module, PREPROCESS, FACTS, folder, IMAGES)


def model_with(size: int = 3) -> ir.Model:
    """A graph with `size` float32 numbers in it."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, size])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, size])
    numbers = onnx.numpy_helper.from_array(np.arange(size, dtype=np.float32), "numbers")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "numbers"], ["y"])], "g", [x], [y], [numbers])
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))


def body_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[TraceCache, Path, Release]:
    """A cache with the graph of a model, its folder, and that model's release as it was traced."""
    folder = tmp_path_factory.mktemp("cache") / "gapstream" / "traces"
    cache = TraceCache(folder)
    return cache, folder, released(Toy(4), tmp_path_factory.mktemp("traced") / "release", cache)


@pytest.fixture
def cache(tmp_path) -> TraceCache:
    return TraceCache(tmp_path / "traces")


@pytest.fixture
def no_tracing(monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr(trace.Trace, "_traced", refuse)


def test_a_release_of_a_kept_graph_is_the_traced_one_bit_by_bit(filled, no_tracing, tmp_path):
    cache, _, traced = filled

    release = released(Toy(4), tmp_path / "release", cache)

    assert release.id == traced.id and release.files == traced.files
    assert sorted(release.files) == sorted(file.name for file in release.path.iterdir() if file.suffix != ".json")


def test_other_weights_and_more_classes_take_the_kept_graph(filled, no_tracing, tmp_path):
    module = Toy(9, seed=1)

    assert_answers_like(released(module, tmp_path / "release", filled[0]), module, IMAGES)


def test_nothing_of_a_states_weights_or_names_is_in_what_is_kept(filled):
    [entry] = filled[1].iterdir()
    data = entry.read_bytes()

    for tensor in tensors_of(Toy(4)).values():
        assert tensor.nbytes < 8 or tensor.numpy().tobytes()[:16] not in data
    assert "class 0" not in data.decode("utf-8", "replace")
    assert len(data) < 20_000  # the weights have 10 kB, the graph 3
    assert entry.stat().st_mode & 0o777 == 0o600 and entry.parent.stat().st_mode & 0o777 == 0o700


def key(module: nn.Module, *asked: object) -> str | None:
    return key_of(module, [*asked], trace.__file__)


class WithNumber(Toy):
    def __init__(self, number: float) -> None:
        super().__init__(3)
        self.number = number


class WithFunction(Toy):
    def __init__(self, function: object) -> None:
        super().__init__(3)
        self.function = function


def tower(**settings: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8, **settings), nn.Flatten(), nn.Linear(128, 16))  # type: ignore[arg-type]


def test_a_key_depends_on_the_structure_and_not_on_weights_or_names():
    assert key(Toy(3, seed=0)) == key(Toy(3, seed=1)) == key(Toy(5))
    other = Toy(3)
    other.classes = ("zebra", "okapi", "hut")
    assert key(other) == key(Toy(3)) == key(Toy(3).train())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Toy(3), lambda: OutsideTensors(3)),
        (lambda: Toy(3, tower()), lambda: Toy(3, nn.Sequential(*tower(), nn.Identity()))),
        (lambda: Toy(3, tower()), lambda: Toy(3, tower(dilation=1, padding=0, padding_mode="reflect"))),
        (lambda: Toy(3, nn.LayerNorm(4, eps=1e-5)), lambda: Toy(3, nn.LayerNorm(4, eps=1e-6))),
        (lambda: WithNumber(1.0), lambda: WithNumber(2.0)),
        (lambda: WithFunction(torch.relu), lambda: WithFunction(torch.tanh)),
    ],
    ids=["another class", "a module more", "another setting", "another epsilon", "another number", "another function"],
)
def test_another_architecture_or_form_has_another_key(one, other):
    assert key(one()) == key(one()) != key(other()) == key(other())


def test_other_shapes_another_opset_and_other_outputs_have_another_key(tmp_path):
    keys = set()
    for opset, outputs, wide in ((20, "abc", 16), (21, "abc", 16), (20, "abd", 16), (20, "abc", 17)):
        module = Toy(3)
        tensors = {**tensors_of(module), "tower.3.bias": torch.zeros(wide)}
        asked = trace.Trace(opset, "images", tuple(outputs))._asked(tensors, module.class_tensors, IMAGES, 0)
        keys.add(key_of(module, asked, trace.__file__))
    assert len(keys) == 4 and None not in keys


@pytest.mark.parametrize("package", ["gapstream", "torch", "onnx", "onnxscript", "onnx-ir"])
def test_another_version_of_a_library_misses(package, monkeypatch):
    before = key(Toy(3))
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == package else real(name))

    assert before != key(Toy(3)) is not None


def test_another_file_of_a_modules_class_misses(monkeypatch):
    before = key(Toy(3))
    real = trace_cache.digest_of
    monkeypatch.setattr(trace_cache, "digest_of", lambda file: "0" * 64 if file == __file__ else real(file))
    assert key(Toy(3)) == before  # this file has no part in it
    assert key(WithNumber(1.0)) is not None
    edited = key(WithNumber(1.0))
    monkeypatch.undo()

    assert key(WithNumber(1.0)) != edited
    assert key_of(Toy(3), [], __file__) != before  # another tracer
    assert key_of(Toy(3), [], "/no/such/file.py") is None


@pytest.mark.parametrize(
    "outside",
    [torch.ones(3), [torch.ones(3)], {"a": (1, torch.ones(3))}, np.ones(3)],
    ids=["", "list", "dict", "numpy"],
)
def test_a_module_with_tensors_outside_its_parameters_and_buffers_is_not_kept(outside):
    module = Toy(3)
    module.outside = outside

    assert key(module) is None


def test_what_was_kept_comes_back_under_its_own_key_alone(cache):
    assert cache.get("a" * 64) is None

    cache.put("a" * 64, model_with())

    found = cache.get("a" * 64)
    assert found is not None and body_of(found) == body_of(model_with())
    assert cache.get("b" * 64) is None
    cache.drop("a" * 64)
    cache.drop("a" * 64)
    assert cache.get("a" * 64) is None


def spoiled(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a byte":
        path.write_bytes(data[:90] + bytes([data[90] ^ 1]) + data[91:])
    elif how == "no text":
        path.write_bytes(bytes(range(256)) * 10)
    elif how == "too large":
        path.write_bytes(data + bytes(MAX_BYTES + 100))
    elif how == "another's":
        TraceCache(path.parent).put("b" * 64, model_with(5))
        (path.parent / f"{'b' * 64}.trace").replace(path)
    elif how == "a link":
        path.rename(path.with_suffix(".moved"))
        path.symlink_to(path.with_suffix(".moved"))
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how", ["cut", "empty", "a byte", "no text", "too large", "another's", "a link", "a pipe", "a folder"]
)
def test_a_file_that_is_not_what_was_written_is_a_miss_with_a_warning(cache, tmp_path, caplog, how):
    cache.put("a" * 64, model_with())
    spoiled(tmp_path / "traces" / f"{'a' * 64}.trace", how)

    assert cache.get("a" * 64) is None

    assert "cannot be used" in caplog.text and "traced anew" in caplog.text


def forged(path: Path, body: bytes) -> None:
    """Write what somebody would who knows the format."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(trace_cache._digest(path.stem, body).encode() + b"\n" + body)


def test_a_forged_file_that_is_no_graph_has_weights_or_names_files_is_a_miss(cache, tmp_path, caplog):
    path = tmp_path / "traces" / f"{'a' * 64}.trace"
    heavy = body_of(model_with(MAX_CONSTANT_BYTES // 4 + 1))
    invalid = ir.to_proto(model_with())
    invalid.graph.node[0].input[0] = "nothing gives this"
    (tmp_path / "secret").write_bytes(bytes(12))
    outside = ir.to_proto(model_with())
    numbers = outside.graph.initializer[0]
    numbers.ClearField("raw_data")
    numbers.data_location = onnx.TensorProto.EXTERNAL
    numbers.external_data.add(key="location", value="../secret")
    for body in (b"no protobuf", heavy, invalid.SerializeToString(), outside.SerializeToString()):
        caplog.clear()
        forged(path, body)
        assert cache.get("a" * 64) is None
        assert "cannot be used" in caplog.text
    forged(path, body_of(model_with()))
    assert cache.get("a" * 64) is not None


def test_a_file_of_another_user_is_a_miss(cache, monkeypatch, caplog):
    cache.put("a" * 64, model_with())
    monkeypatch.setattr(os, "geteuid", lambda: 54321)

    assert cache.get("a" * 64) is None and "no file of this user" in caplog.text


def test_a_graph_with_weights_in_it_is_not_kept(cache, caplog):
    cache.put("a" * 64, model_with(MAX_CONSTANT_BYTES // 4 + 1))

    assert cache.get("a" * 64) is None and "are no weights" in caplog.text


def test_a_kept_graph_that_does_not_answer_as_the_model_is_dropped_and_traced_anew(filled, tmp_path, caplog):
    # given a sound graph of another model under this one's key
    cache, folder, _ = filled
    [entry] = folder.iterdir()
    good = entry.read_bytes()
    cache.put(entry.stem, model_with())

    # when
    release = released(Toy(4), tmp_path / "first", cache)

    # then
    assert "does not fit this model, it is traced anew" in caplog.text
    assert_answers_like(release, Toy(4), IMAGES)
    assert entry.read_bytes() == good


def test_a_folder_that_cannot_be_written_or_a_full_disk_costs_a_warning_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    TraceCache(tmp_path / "file" / "traces").put("a" * 64, model_with())
    assert "is not kept" in caplog.text and "traces again" in caplog.text
    assert TraceCache(tmp_path / "file" / "traces").get("a" * 64) is None

    caplog.clear()

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    TraceCache(tmp_path / "traces").put("a" * 64, model_with())

    assert "No space left" in caplog.text
    assert list((tmp_path / "traces").iterdir()) == []


def test_the_graphs_used_last_stay_and_unfinished_files_go(cache, tmp_path):
    folder = tmp_path / "traces"
    keys = [f"{number:064x}" for number in range(MAX_ENTRIES + 3)]
    for number, one in enumerate(keys[:MAX_ENTRIES]):
        cache.put(one, model_with())
        os.utime(folder / f"{one}.trace", (1000 + number, 1000 + number))
    (folder / "tmpold").touch()
    os.utime(folder / "tmpold", (1000, 1000))
    (folder / "tmpnew").touch()

    assert cache.get(keys[0]) is not None  # used now
    for one in keys[MAX_ENTRIES:]:
        cache.put(one, model_with())

    assert len(list(folder.glob("*.trace"))) == MAX_ENTRIES
    assert [cache.get(one) is not None for one in keys[:5]] == [True, False, False, False, True]
    assert not (folder / "tmpold").exists() and (folder / "tmpnew").exists()


def test_many_at_once_never_find_half_a_graph(cache, caplog):
    found = []

    def work() -> None:
        for number in range(40):
            cache.put(f"{number % 3:064x}", model_with())
            found.append(cache.get(f"{(number + 1) % 3:064x}"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 160 and caplog.text == ""
    assert all(one is None or body_of(one) == body_of(model_with()) for one in found)


def test_the_cache_of_a_user_is_where_the_base_directory_specification_has_it(tmp_path):
    def folder(**env: str) -> Path:
        cache = user_cache(env)
        assert cache is not None
        return cache._folder

    assert folder(XDG_CACHE_HOME=str(tmp_path)) == tmp_path / "gapstream" / "traces"
    assert folder() == folder(XDG_CACHE_HOME="relative") == Path.home() / ".cache" / "gapstream" / "traces"


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)

    assert user_cache({}) is None
