"""Turns an inference module into a checked release.

The graph is traced with its weights as inputs, once per structure; a release fills them in. So the first release of a
process takes seconds, later ones, also with more classes, only the time to write and check them.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporter.preprocess import Preprocess
from exporter.release import GOLDEN, MODEL, Parity, Release, ReleaseError, Variant, digest, variant_name, write
from exporter.runtime import OUTPUTS, Answers, Device, Session

log = logging.getLogger(__name__)

SINGLE_FILE_BYTES = 1_800_000_000
"""Larger weights go to a second file: protobuf ends at 2 GiB."""
GOLDEN_IMAGES = 4
MAX_ACCURACY_DROP = 0.01
"""Of a smaller form against fp32, on the hold-out."""
TIE = 1e-3
"""Two classes whose probabilities differ by less than this share are equally first."""
_REFERENCE_BATCH = 16
_CLASSES = 3
"""Classes in the example that is traced: neither 0 nor 1, which torch.export takes for constants."""


Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Preprocessed images [B, 3, H, W] and the number of each one's class [B]."""


@dataclass(frozen=True)
class Tolerance:
    """What parity is held to."""

    atol: float
    """Largest difference in embeddings and probabilities."""
    logits: float
    """Largest difference in logits, relative to the largest."""
    cosine: float
    """Smallest cosine between embeddings."""
    top1: float
    """Smallest share of images with the same first class."""


TOLERANCES = {
    "fp16": Tolerance(atol=0.02, logits=0.05, cosine=0.999, top1=0.95),
    "int8": Tolerance(atol=0.1, logits=0.1, cosine=0.98, top1=0.9),
}
"""Of the smaller forms; how much they cost is judged by the accuracy on the hold-out."""


class ParityError(ReleaseError):
    """onnxruntime's answers are not the trained model's; the message has the numbers. Nothing was released."""


class OnnxExporter:
    """Makes releases; keeps the traced graph, without weights, between them. Not thread-safe."""

    def __init__(
        self,
        opset: int = 20,
        max_batch: int = 64,
        atol: float = 1e-3,
        threads: int = 0,
        precisions: Sequence[str] = (),
    ) -> None:
        """`max_batch`: largest batch checked; `atol`: largest difference in embeddings and probabilities, and in logits
        relative to the largest; `threads`: of onnxruntime during the check, 0 for all cores; `precisions`: `fp16`,
        `int8`, beside fp32."""
        if unknown := set(precisions) - set(TOLERANCES):
            raise ValueError(f"got precisions {sorted(unknown)}, expected some of {', '.join(TOLERANCES)}")
        self._precisions = precisions
        self._opset = opset
        self._max_batch = max_batch
        self._fp32 = Tolerance(atol, logits=atol, cosine=0.9999, top1=1.0)
        self._threads = threads
        self._structure: object = None
        self._template: ir.Model | None = None

    def release(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        facts: Mapping[str, Any],
        folder: Path,
        check_images: NDArray[np.float32],
        holdout: Sequence[Labelled] = (),
    ) -> Release:
        """Write `module` and all that belongs to it into `folder` (made here, must not exist).

        `module`, in eval mode, has `classes` (names) and `class_tensors` (names of the buffers with a row per class),
        and gives embedding, logits and probabilities. `check_images`: float32 [n >= 1, 3, H, W], preprocessed; parity
        is measured on them, repeated up to `max_batch`, and the first few are shipped as golden inputs. `facts` is
        JSON-able. `holdout`: batches of images the model never learned from, with the number of each one's class; a
        smaller form that answers fewer of them right than fp32, by more than a point, is left out, as is one that fails
        its parity check.

        Raises ParityError when onnxruntime disagrees with torch in fp32, and ReleaseError when torch cannot trace the
        module; no folder is left behind.
        """
        size = preprocess.size
        if check_images.ndim != 4 or not len(check_images) or check_images.shape[1:] != (3, size, size):
            raise ValueError(f"got check images of shape {check_images.shape}, expected [n >= 1, 3, {size}, {size}]")
        folder.mkdir(parents=True)
        try:
            return self._release(module, preprocess, facts, folder, check_images, holdout)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _release(
        self,
        module: Any,
        preprocess: Preprocess,
        facts: Mapping[str, Any],
        folder: Path,
        check_images: NDArray[np.float32],
        holdout: Sequence[Labelled],
    ) -> Release:
        tensors = _tensors(module)
        images = check_images[np.arange(self._max_batch) % len(check_images)]
        expected = _reference(module, images)
        metadata = {
            "classes": json.dumps(module.classes, ensure_ascii=False),
            "preprocess": json.dumps(preprocess.to_dict()),
            **{key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()},
        }
        device: Device = "cuda" if any(tensor.is_cuda for tensor in tensors.values()) else "cpu"

        def attempt() -> tuple[ir.Model, Parity, dict[str, float]]:
            began = time.monotonic()
            structure = (type(module), images.shape[1:], _shapes(tensors, frozenset(module.class_tensors)))
            if self._template is None or structure != self._structure:
                try:
                    self._template = _trace(module, images[:2], self._opset)
                except torch.onnx.OnnxExporterError as error:
                    found = str(error.__cause__ or error).splitlines()[0]
                    raise ReleaseError(f"torch cannot trace {type(module).__name__} ({found}); not released") from error
                self._structure = structure
            traced = time.monotonic()
            widths = [values.shape[1] for values in expected[0]]
            model = _fill(self._template, tensors, widths, metadata, folder / MODEL)
            written = time.monotonic()
            session = Session(folder / MODEL, device=device, threads=self._threads)
            parity = compare(session, images, expected, (1, 3, self._max_batch))
            seconds = {"trace": traced - began, "write": written - traced, "check": time.monotonic() - written}
            return model, parity, seconds

        traced_before = self._template
        model, parity, seconds = attempt()
        try:
            _judge(parity, self._fp32)
        except ParityError as error:
            if self._template is not traced_before:
                raise
            # A number kept outside the tensors (a float attribute of the module) is part of the graph.
            log.warning("the graph traced earlier does not fit this model, tracing it again: %s", error)
            self._template = None
            model, parity, seconds = attempt()
            _judge(parity, self._fp32)

        began = time.monotonic()
        variants = {
            precision: self._variant(precision, folder, device, images, expected[0], holdout)
            for precision in self._precisions
        }
        seconds["variants"] = time.monotonic() - began

        golden = min(GOLDEN_IMAGES, len(check_images))
        embedding, logits, probabilities = (values[:golden] for values in expected[0])
        np.savez(
            folder / GOLDEN, images=images[:golden], embedding=embedding, logits=logits, probabilities=probabilities
        )
        release = Release(
            path=folder,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            classes=tuple(module.classes),
            preprocess=preprocess,
            facts=dict(facts),
            opset=self._opset,
            ir_version=model.ir_version,
            precision="fp32",
            parity=parity,
            atol=self._fp32.atol,
            files={file.name: digest(file) for file in sorted(folder.iterdir())},
            versions={module.__name__: module.__version__ for module in (torch, onnx, onnxscript, onnxruntime, np)},
            seconds={phase: round(value, 3) for phase, value in seconds.items()},
            variants=variants,
        )
        write(release)
        log.info("released %s: %d classes, %s, seconds %s", release.id, len(release.classes), parity, release.seconds)
        return release

    def _variant(
        self,
        precision: str,
        folder: Path,
        device: Device,
        images: NDArray[np.float32],
        expected: Answers,
        holdout: Sequence[Labelled],
    ) -> Variant:
        """Write the model in another precision beside the first; removed again when it is not close enough."""
        from exporter import precision as forms  # pulls in onnxruntime's quantization tools, which few ask for

        path = folder / variant_name(precision)
        tolerance = TOLERANCES[precision]
        parity = accuracy = accuracy_fp32 = refused = None
        try:
            getattr(forms, precision)(folder / MODEL, path, SINGLE_FILE_BYTES)
            session = Session(path, device="cpu" if precision == "int8" else device, threads=self._threads)
            parity = compare(session, images, [expected], (1, 3, len(images)))
            if holdout:
                accuracy = _accuracy(session, holdout)
                accuracy_fp32 = _accuracy(Session(folder / MODEL, device=device, threads=self._threads), holdout)
            _judge(parity, tolerance)
            if accuracy is not None and accuracy_fp32 is not None and accuracy_fp32 - accuracy > MAX_ACCURACY_DROP:
                refused = f"accuracy on the hold-out is {accuracy:.1%}, and {accuracy_fp32:.1%} in fp32"
        except Exception as error:  # converters and onnxruntime share no base class; fp32 is released all the same
            refused = str(error) if isinstance(error, ParityError) else f"{type(error).__name__}: {error}"
        if refused is not None:
            log.warning("the release has no %s form: %s", precision, refused)
            for file in folder.glob(f"{path.name}*"):
                file.unlink()
        return Variant(parity, tolerance.atol, accuracy, accuracy_fp32, refused)


def _accuracy(session: Session, holdout: Sequence[Labelled]) -> float:
    right = sum(int((session.run(images).probabilities.argmax(1) == labels).sum()) for images, labels in holdout)
    return right / sum(len(labels) for _, labels in holdout)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its name, shared ones under all their names, as the trace may pick any."""
    return {
        **{name: tensor.detach() for name, tensor in module.named_parameters(remove_duplicate=False)},
        **{name: tensor.detach() for name, tensor in module.named_buffers(remove_duplicate=False)},
    }


def _shapes(tensors: Mapping[str, Tensor], wildcards: frozenset[str]) -> tuple:
    return tuple(
        (name, tuple(tensor.shape)[1:] if name in wildcards else tuple(tensor.shape), tensor.dtype, name in wildcards)
        for name, tensor in tensors.items()
    )


class _ClassesAsInputs(nn.Module):
    """`module` with its class tensors as arguments, so that the trace leaves the number of classes open."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor, class_tensors: list[Tensor]) -> tuple[Tensor, ...]:
        replaced = dict(zip(self.module.class_tensors, class_tensors, strict=True))
        return torch.func.functional_call(self.module, replaced, (images,))


def _trace(module: Any, images: NDArray[np.float32], opset: int) -> ir.Model:
    """The module's graph with every parameter and buffer as an input of the graph, under the module's own name."""
    module = copy.deepcopy(module).cpu().eval()
    example = [getattr(module, name) for name in module.class_tensors]
    example = [tensor[torch.arange(_CLASSES) % len(tensor)] for tensor in example]
    batch, classes = torch.export.Dim("batch", min=1), torch.export.Dim("classes", min=1)
    with warnings.catch_warnings(), _silenced("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _ClassesAsInputs(module).eval(),
            # Two images: an example batch of one exports, passes the checker and fails at three (pytorch#157621).
            (torch.from_numpy(images.copy()), example),
            dynamo=True,
            # Constant folding would swallow weights that later releases must replace.
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=["images", *module.class_tensors],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: batch}, [{0: classes} for _ in example]),
        )
    assert program is not None
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith("module."):
            del graph.initializers[name]
            value.const_value = None
            value.name = name.removeprefix("module.")
            graph.inputs.append(value)
    # What hangs on no weight is folded here: the casts left by the tracer would keep onnxruntime from merging batch
    # norms into convolutions (a convolutional trunk took 2.4 times as long for an image).
    with _silenced("onnxscript", "onnx_ir"):
        onnxscript.optimizer.optimize(program.model)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with this machine's paths
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = None  # onnxruntime infers it, with the number of classes known
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return program.model


def _fill(
    template: ir.Model,
    tensors: Mapping[str, Tensor],
    widths: Sequence[int],
    metadata: Mapping[str, str],
    path: Path,
) -> ir.Model:
    """The template with `tensors` as its weights and [batch, width] as the shape of its outputs, saved to `path`."""
    model = template.clone()
    graph = model.graph
    size = 0
    weights = graph.inputs[1:]
    del graph.inputs[1:]
    for value in weights:
        array = tensors[str(value.name)].cpu().contiguous().numpy()
        value.const_value = ir.tensor(array, name=value.name)
        value.shape = ir.Shape(array.shape)
        graph.register_initializer(value)
        size += array.nbytes
    for output, width in zip(graph.outputs, widths, strict=True):
        output.shape = ir.Shape(["batch", width])
    model.metadata_props.update(metadata)
    ir.save(model, path, external_data=f"{path.name}.data" if size > SINGLE_FILE_BYTES else None)
    return model


def _reference(module: Any, images: NDArray[np.float32]) -> list[Answers]:
    """The module's own answers: to all images with the fused attention kernel that evaluation uses, to the first few
    without it."""
    device = next(iter(_tensors(module).values())).device
    fused = torch.backends.mha.get_fastpath_enabled()
    answers = []
    try:
        for fast, whole in ((True, images), (False, images[:3])):
            torch.backends.mha.set_fastpath_enabled(fast)
            with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
                # In parts: as a whole, activations would be the largest piece of memory of an update.
                parts = [module(part.to(device)) for part in torch.from_numpy(whole).split(_REFERENCE_BATCH)]
            answers.append(Answers(*(torch.cat(outputs).float().cpu().numpy() for outputs in zip(*parts, strict=True))))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return answers


def compare(
    session: Session, images: NDArray[np.float32], expected: Sequence[Answers], batches: Sequence[int]
) -> Parity:
    """How far the session's answers to the first images, in batches of these sizes, are from each of `expected`
    (answers to the first images, all or some)."""
    embedding = logits = probabilities = 0.0
    cosine = top1 = 1.0
    for size in batches:
        answers = session.run(images[:size])
        for whole in expected:
            want = Answers(*(values[:size] for values in whole))
            got = Answers(*(values[: len(want.embedding)] for values in answers))
            # np.maximum and np.minimum, unlike max and min, let a NaN through.
            embedding = np.maximum(embedding, np.abs(got.embedding - want.embedding).max())
            scale = max(1.0, float(np.abs(want.logits).max()))
            logits = np.maximum(logits, np.abs(got.logits - want.logits).max() / scale)
            probabilities = np.maximum(probabilities, np.abs(got.probabilities - want.probabilities).max())
            cosine = np.minimum(cosine, (got.embedding * want.embedding).sum(axis=1).min())
            chosen = np.take_along_axis(want.probabilities, got.probabilities.argmax(axis=1)[:, None], axis=1)[:, 0]
            top1 = np.minimum(top1, (chosen >= want.probabilities.max(axis=1) * (1 - TIE)).mean())
    return Parity(
        embedding=float(embedding),
        logits=float(logits),
        probabilities=float(probabilities),
        cosine=float(cosine),
        top1=float(top1),
        images=len(images),
        batches=tuple(batches),
        provider=session.provider,
    )


def _judge(parity: Parity, tolerance: Tolerance) -> None:
    """Raises ParityError with every number that is out of bounds (NaN always is)."""
    found = [
        f"{name} differ by {difference:.3g}, at most {allowed:g} is allowed"
        for name, difference, allowed in (
            ("embeddings", parity.embedding, tolerance.atol),
            ("logits (relative to the largest)", parity.logits, tolerance.logits),
            ("probabilities", parity.probabilities, tolerance.atol),
        )
        if not difference <= allowed
    ]
    if not parity.cosine >= tolerance.cosine:
        found.append(f"the smallest cosine of embeddings is {parity.cosine:.6g}, expected at least {tolerance.cosine}")
    if not parity.top1 >= tolerance.top1:
        found.append(f"the first class agrees for {parity.top1:.1%} of the images, expected {tolerance.top1:.0%}")
    if found:
        checked = f"on {parity.images} images in batches of {', '.join(map(str, parity.batches))} ({parity.provider})"
        raise ParityError(f"onnxruntime does not answer as the model does {checked}: {'; '.join(found)}; not released")


@contextmanager
def _silenced(*loggers: str) -> Iterator[None]:
    """Hold back the tracer's progress and advice; its errors are exceptions."""
    levels = [(logger := logging.getLogger(name), logger.level) for name in loggers]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
