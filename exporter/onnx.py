"""Turns an inference module, and the text tower that belongs to it, into a checked release.

Each graph is traced with its weights as inputs, once per structure; a release fills them in. So the first release of a
process takes seconds, later ones, also with more classes, only the time to write and check them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporter.preprocess import Preprocess
from exporter.release import (
    GOLDEN,
    MODEL,
    TEXT,
    TEXT_ROWS,
    TOKENIZER,
    Parity,
    Release,
    ReleaseError,
    TextPart,
    Variant,
    digest,
    variant_name,
    write,
)
from exporter.runtime import OUTPUTS, Answers, Session
from exporter.session import Device
from exporter.text import name_encoder

log = logging.getLogger(__name__)
T = TypeVar("T")

SINGLE_FILE_BYTES = 1_800_000_000
"""Larger weights go to a second file: protobuf ends at 2 GiB."""
GOLDEN_IMAGES = 4
MAX_ACCURACY_DROP = 0.01
"""Of a smaller form against fp32, on the hold-out."""
TIE = 1e-3
"""Two classes whose probabilities differ by less than this share are equally first."""
_REFERENCE_BATCH = 16
_EXAMPLE = 3
"""Classes in the example that is traced: neither 0 nor 1, which torch.export takes for constants."""
_CHECK_NAMES = ("zebra", "a snow-covered mountain hut, seen from far away", "Größenmaßstab 3,5", "thing")
"""Beside learned classes: names of one and of many tokens, few of which were learned."""
_CHECK_CLASSES = 12
_PAGE = 4096


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


@dataclass(frozen=True)
class Text:
    """What the text part of a release is made of."""

    module: Any
    """Token ids int64 [n, L] -> embeddings [n, D], L2-normalised. Has `prompt` and `scale` (see TextPart),
    `tokenize(names)` -> ids, `varying` (tensors whose first dimension changes between releases) and `frozen` (tensors
    that never change), both as names."""
    tokenizer: Callable[[], tuple[str, str]]
    """Gives the JSON of the library `tokenizers`, and the name in exporter.text.CLEANUPS of what comes before it. May
    raise, saying why there is none."""


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
        self._model = _Trace(opset, "images", OUTPUTS)
        self._text = _Trace(opset, "ids", ("embedding",))
        self._frozen: tuple[object, tuple[int, str]] | None = None

    def release(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        facts: Mapping[str, Any],
        folder: Path,
        check_images: NDArray[np.float32],
        holdout: Sequence[Labelled] = (),
        text: Text | None = None,
        before: Path | None = None,
    ) -> Release:
        """Write `module` and all that belongs to it into `folder` (made here, must not exist).

        `module`, in eval mode, has `classes` (names) and `class_tensors` (names of the buffers with a row per class),
        and gives embedding, logits and probabilities. `check_images`: float32 [n >= 1, 3, H, W], preprocessed; parity
        is measured on them, repeated up to `max_batch`, and the first few are shipped as golden inputs. `facts` is
        JSON-able. `holdout`: batches of images the model never learned from, with the number of each one's class; a
        smaller form that answers fewer of them right than fp32, by more than a point, is left out, as is one that fails
        its parity check, and `text`, beside which names that were never learned can be scored. `before`: folder of the
        release before, with which equal files are shared.

        Raises ParityError when onnxruntime disagrees with torch in fp32, and ReleaseError when torch cannot trace the
        module; no folder is left behind.
        """
        size = preprocess.size
        if check_images.ndim != 4 or not len(check_images) or check_images.shape[1:] != (3, size, size):
            raise ValueError(f"got check images of shape {check_images.shape}, expected [n >= 1, 3, {size}, {size}]")
        folder.mkdir(parents=True)
        try:
            return self._release(module, preprocess, facts, folder, check_images, holdout, text, before)
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
        text: Text | None,
        before: Path | None,
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

        seconds: dict[str, float] = {}

        def attempt(template: ir.Model) -> tuple[ir.Model, Parity]:
            traced = time.monotonic()
            widths = [values.shape[1] for values in expected[0]]
            model = _fill(template, {name: _constant(name, tensor) for name, tensor in tensors.items()}, widths)
            model.metadata_props.update(metadata)
            size = sum(tensor.nbytes for tensor in tensors.values())
            ir.save(model, folder / MODEL, external_data=f"{MODEL}.data" if size > SINGLE_FILE_BYTES else None)
            written = time.monotonic()
            session = Session(folder / MODEL, device=device, threads=self._threads)
            parity = compare(session, images, expected, (1, 3, self._max_batch))
            seconds.update(write=written - traced, check=time.monotonic() - written)
            _judge(parity, self._fp32)
            return model, parity

        model, parity = self._model.fitting(module, tensors, module.class_tensors, images[:2], 0, attempt)
        seconds["trace"] = self._model.seconds

        began = time.monotonic()
        variants = {
            precision: self._variant(precision, folder, device, images, expected[0], holdout)
            for precision in self._precisions
        }
        seconds["variants"] = time.monotonic() - began

        began = time.monotonic()
        part = None if text is None else self._text_part(text, module.classes, folder, before, device)
        seconds["text"] = time.monotonic() - began

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
            text=part,
        )
        write(release)
        log.info("released %s: %d classes, %s, seconds %s", release.id, len(release.classes), parity, release.seconds)
        return release

    def _text_part(
        self, text: Text, classes: Sequence[str], folder: Path, before: Path | None, device: Device
    ) -> TextPart:
        """Write the text part beside the model; removed again when its embeddings are not torch's."""
        module = text.module
        difference = cosine = refused = None
        clean = ""

        def attempt(template: ir.Model) -> None:
            nonlocal difference, cosine
            self._write_text(template, tensors, module.frozen, expected.shape[1], folder, before)
            encode = name_encoder(folder, module.prompt, clean, device, self._threads)
            got = np.concatenate([encode(names[:1]), encode(names[1:4]), encode(names[4:])])
            difference = float(np.abs(got - expected).max())
            cosine = float((got * expected).sum(axis=1).min())
            if not (difference <= self._fp32.atol and cosine >= self._fp32.cosine):
                raise ParityError(
                    f"embeddings of {len(names)} names differ by {difference:.3g}, at most {self._fp32.atol:g} is "
                    f"allowed, their smallest cosine is {cosine:.6g}, expected at least {self._fp32.cosine}"
                )

        try:
            tensors = _tensors(module)
            rows = _embeddings(module, classes)
            names = [*classes[-_CHECK_CLASSES:], *_CHECK_NAMES]
            expected = np.concatenate([rows[-_CHECK_CLASSES:], _embeddings(module, _CHECK_NAMES)])
            np.save(folder / TEXT_ROWS, rows)
            json_text, clean = text.tokenizer()
            tokenizer = json_text.encode()
            _share(folder / TOKENIZER, before, (len(tokenizer), hashlib.sha256(tokenizer).hexdigest()), [tokenizer])
            ids = module.tokenize(names[:2]).cpu().numpy()
            self._text.fitting(module, tensors, module.varying, ids[:, :-1], ids.shape[1], attempt)
        except Exception as error:  # torch and tokenizers share no base class; the model is released all the same
            refused = str(error) if isinstance(error, ReleaseError) else f"{type(error).__name__}: {error}"
            log.warning("the release has no text part: %s", refused)
            for file in (*folder.glob("text.*"), folder / TOKENIZER):
                file.unlink(missing_ok=True)
        return TextPart(module.prompt, clean, module.scale, difference, cosine, self._fp32.atol, refused)

    def _write_text(
        self,
        template: ir.Model,
        tensors: Mapping[str, Tensor],
        frozen: frozenset[str],
        width: int,
        folder: Path,
        before: Path | None,
    ) -> None:
        """The text tower's graph; weights that never change are in a file of their own, which releases share."""
        apart = {name: tensors[name] for name in sorted(frozen)}
        weights: dict[str, Any] = {name: _constant(name, t) for name, t in tensors.items() if name not in frozen}
        path = folder / f"{TEXT}.data"
        size = 0
        for name, tensor in apart.items():
            kind, shape = _constant(name, tensor).dtype, ir.Shape(tensor.shape)
            weights[name] = ir.ExternalTensor(path.name, size, tensor.nbytes, kind, shape=shape, name=name)
            size += -(-tensor.nbytes // _PAGE) * _PAGE
        key = [(name, tensor.data_ptr()) for name, tensor in apart.items()]
        if self._frozen is None or self._frozen[0] != key:
            sha256 = hashlib.sha256()
            for piece in _pages(apart.values()):
                sha256.update(piece)
            self._frozen = key, (size, sha256.hexdigest())
        if apart:
            _share(path, before, self._frozen[1], _pages(apart.values()))
        ir.save(_fill(template, weights, [width]), folder / TEXT)

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


class _Trace:
    """The graph of one kind of module, without weights; traced when a module of another structure comes."""

    def __init__(self, opset: int, source: str, outputs: Sequence[str]) -> None:
        """`source` and `outputs`: names in the graph."""
        self._opset = opset
        self._source = source
        self._outputs = outputs
        self._structure: object = None
        self._graph: ir.Model | None = None
        self.seconds = 0.0
        """Of the tracing that the last `fitting` took."""

    def fitting(
        self,
        module: Any,
        tensors: Mapping[str, Tensor],
        varying: Sequence[str],
        example: NDArray[Any],
        longest: int,
        attempt: Callable[[ir.Model], T],
    ) -> T:
        """What `attempt` makes of the graph of `module`. Where that was traced for an earlier module and does not fit,
        which `attempt` says by a ParityError, it is traced anew.

        `varying`: tensors whose first dimension is left open, as is that of `example`; so is its second, up to
        `longest`, unless that is 0. Raises ReleaseError when torch cannot trace the module.
        """
        began = time.monotonic()
        structure = (type(module), example.shape[1:], _shapes(tensors, frozenset(varying)))
        fresh = self._graph is None or structure != self._structure
        if self._graph is None or fresh:
            self._graph = self._traced(module, varying, example, longest)
            self._structure = structure
        self.seconds = time.monotonic() - began
        try:
            return attempt(self._graph)
        except ParityError as error:
            if fresh:
                raise
            # A number kept outside the tensors (a float attribute of the module) is part of the graph.
            log.warning("the graph traced earlier does not fit this model, tracing it again: %s", error)
            self._graph = self._traced(module, varying, example, longest)
            self.seconds = time.monotonic() - began
            return attempt(self._graph)

    def _traced(self, module: Any, varying: Sequence[str], example: NDArray[Any], longest: int) -> ir.Model:
        dimensions = {0: torch.export.Dim("batch", min=1)}
        if longest:
            dimensions[1] = torch.export.Dim("length", min=2, max=longest)
        try:
            return _trace(module, varying, example, dimensions, self._opset, self._source, self._outputs)
        except torch.onnx.OnnxExporterError as error:
            found = str(error.__cause__ or error).splitlines()[0]
            raise ReleaseError(f"torch cannot trace {type(module).__name__} ({found}); not released") from error


class _VaryingAsInputs(nn.Module):
    """`module` with its varying tensors as arguments, so that the trace leaves their first dimension open."""

    def __init__(self, module: Any, varying: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.varying = varying

    def forward(self, source: Tensor, varying: list[Tensor]) -> Any:
        replaced = dict(zip(self.varying, varying, strict=True))
        return torch.func.functional_call(self.module, replaced, (source,))


def _trace(
    module: Any,
    varying: Sequence[str],
    example: NDArray[Any],
    dimensions: Mapping[int, Any],
    opset: int,
    source: str,
    outputs: Sequence[str],
) -> ir.Model:
    """The module's graph with every parameter and buffer as an input of the graph, under the module's own name."""
    module = copy.deepcopy(module).cpu().eval()
    others = [getattr(module, name) for name in varying]
    others = [tensor[torch.arange(_EXAMPLE) % len(tensor)] for tensor in others]
    free = torch.export.Dim("classes", min=1)
    with warnings.catch_warnings(), _silenced("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _VaryingAsInputs(module, varying).eval(),
            # Two examples: a batch of one exports, passes the checker and fails at three (pytorch#157621).
            (torch.from_numpy(example.copy()), others),
            dynamo=True,
            # Constant folding would swallow weights that later releases must replace.
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=[source, *varying],
            output_names=list(outputs),
            dynamic_shapes=(dict(dimensions), [{0: free} for _ in others]),
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


def _fill(template: ir.Model, weights: Mapping[str, Any], widths: Sequence[int]) -> ir.Model:
    """The template with `weights` (onnx_ir tensors) and [batch, width] as the shape of its outputs."""
    model = template.clone()
    graph = model.graph
    empty = graph.inputs[1:]
    del graph.inputs[1:]
    for value in empty:
        weight = value.const_value = weights[str(value.name)]
        value.shape = ir.Shape(weight.shape)
        graph.register_initializer(value)
    for output, width in zip(graph.outputs, widths, strict=True):
        output.shape = ir.Shape(["batch", width])
    return model


def _constant(name: str, tensor: Tensor) -> ir.TensorProtocol:
    return ir.tensor(tensor.cpu().contiguous().numpy(), name=name)


def _pages(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """Their bytes, each tensor's filled up to whole pages, which onnxruntime can map."""
    for tensor in tensors:
        data = tensor.cpu().contiguous().numpy().tobytes()
        yield data
        yield bytes(-len(data) % _PAGE)


def _share(path: Path, before: Path | None, wanted: tuple[int, str], pieces: Iterable[bytes]) -> None:
    """Put a file of this size and sha256 at `path`: the one in the folder `before` by a hard link, or else `pieces`."""
    path.unlink(missing_ok=True)  # never written through: other releases may have the same file
    same = before and before / path.name
    try:
        if same and digest(same) == wanted:
            path.hardlink_to(same)
            return
    except OSError:
        pass  # there is none, or no link can be made: it is written
    with path.open("wb") as file:
        file.writelines(pieces)


def _embeddings(module: Any, names: Sequence[str]) -> NDArray[np.float32]:
    """The text module's own answers, float32 [n, D]."""
    with torch.no_grad():
        parts = [module(module.tokenize(names[i : i + 64])) for i in range(0, len(names), 64)]
    return torch.cat(parts).float().cpu().numpy()


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
