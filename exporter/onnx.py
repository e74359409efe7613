"""Turns an inference module, and the text tower that belongs to it, into a checked release.

Each graph is traced with its weights as inputs, once per structure; a release fills them in. So the first release of a
machine takes many seconds, later ones, also with more classes, only the time to write and check them.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from exporter import golden
from exporter.parity import compare, judge, reference_answers
from exporter.precision import FP32, PRECISIONS, Tolerance
from exporter.preprocess import Preprocess
from exporter.release import GOLDEN, MODEL, Parity, ParityError, Release, Variant, digest, variant_name, write
from exporter.runtime import OUTPUTS, Answers, Session
from exporter.session import Device
from exporter.text_export import TextExporter, TextToRelease
from exporter.trace import EXAMPLE_BATCH, Trace, constant, filled, tensors_of
from exporter.trace_cache import TraceCache

log = logging.getLogger(__name__)

SINGLE_FILE_BYTES = 1_800_000_000
"""Weights larger than this go to a second file. protobuf ends at 2 GiB; the rest is room for graph and class names."""

GOLDEN_IMAGES = 4
"""Check images shipped with their answers, at most. Chosen by hand: readers test themselves with one and with all of
them at every start, and an image of 224 x 224 pixels takes 600 kB."""

MAX_ACCURACY_DROP = 0.01
"""Share of the held-out images by which a variant may answer fewer right than fp32. Chosen by hand: with a larger one a
variant could lose more than the update before it won. With few held-out images a single one is more than this."""

SMALL_BATCHES = (1, 3)
"""Batch sizes every model is checked at, beside its largest. A graph whose batch the trace has fixed answers right at
that size alone; neither of these is the size that is traced (exporter.trace.EXAMPLE_BATCH)."""

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Preprocessed images [B, 3, H, W] and the number of each one's class [B]."""


class OnnxExporter:
    """Makes releases. It keeps the traced graphs, without weights, between them. Not thread-safe."""

    def __init__(
        self,
        opset: int = 20,
        max_batch: int = 64,
        atol: float = 1e-3,
        threads: int = 0,
        precisions: Sequence[str] = (),
        traces: TraceCache | None = None,
    ) -> None:
        """`opset`: ONNX operator set; `max_batch`: largest batch checked; `atol`: largest difference allowed in
        embeddings and probabilities, and in logits relative to the largest; `threads`: CPU threads of onnxruntime
        during the check, 0 for all cores; `precisions`: names in exporter.precision.PRECISIONS, released beside fp32;
        `traces`: where traced graphs are kept on disk.

        Raises ValueError for a precision that is not known.
        """
        if unknown := set(precisions) - set(PRECISIONS):
            raise ValueError(f"got precisions {sorted(unknown)}, expected some of {', '.join(PRECISIONS)}")
        self._precisions = precisions
        self._opset = opset
        self._max_batch = max_batch
        # Cosine and first class are not for the operator to choose: what float32 rounds is far below the one, and ties
        # apart (exporter.parity.TIE), another first class is a mistake in the graph.
        self._fp32 = Tolerance(atol, logits=atol, cosine=0.9999, top1=1.0)
        self._threads = threads
        self._model = Trace(opset, "images", OUTPUTS, traces)
        self._text = TextExporter(opset, self._fp32, threads, traces)

    def release(
        self,
        module: Any,
        preprocess: Preprocess,
        facts: Mapping[str, Any],
        folder: Path,
        check_images: NDArray[np.float32],
        holdout: Sequence[Labelled] = (),
        text: TextToRelease | None = None,
        before: Path | None = None,
    ) -> Release:
        """Write `module` and all that belongs to it into `folder` (made here, must not exist).

        `module`: a torch module in eval mode that has `classes` (names) and `class_tensors` (names of the buffers with
        a row per class), and gives embedding, logits and probabilities. `facts`: what is said of the model in the
        release, JSON-able. `check_images`: float32 [n >= 1, 3, H, W], preprocessed; parity is measured on them,
        repeated up to `max_batch`, and the first few are shipped as golden inputs. `holdout`: batches of images the
        model never learned from; a variant that answers fewer of them right than fp32 by more than a point is left out,
        as is one that fails its parity check. `text`: the text tower, so that names never learned can be scored too; it
        is left out where it cannot be released. `before`: folder of the release before, with which equal files are
        shared.

        Raises ValueError for check images of another shape, ParityError when onnxruntime disagrees with torch in fp32,
        and ReleaseError when torch cannot trace the module; no folder is left behind.
        """
        size = preprocess.size
        if check_images.ndim != 4 or not len(check_images) or check_images.shape[1:] != (3, size, size):
            raise ValueError(f"got check images of shape {check_images.shape}, expected [n >= 1, 3, {size}, {size}]")
        # In the model's file too, for readers that have nothing but that.
        metadata = {
            "classes": json.dumps(module.classes, ensure_ascii=False),
            "preprocess": json.dumps(preprocess.to_dict()),
            **{key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()},
        }
        seconds: dict[str, float] = {}
        with _made_whole(folder):
            images = check_images[np.arange(self._max_batch) % len(check_images)]
            expected = reference_answers(module, images)
            # The check is worth most on the kind of device that will answer, which as a rule is the one that trained.
            device: Device = "cuda" if any(tensor.is_cuda for tensor in tensors_of(module).values()) else "cpu"
            model, parity = self._write_model(module, metadata, folder, device, images, expected, seconds)
            with _timed(seconds, "variants"):
                variants = {
                    precision: self._write_variant(precision, folder, device, images, expected[0], holdout)
                    for precision in self._precisions
                }
            with _timed(seconds, "text"):
                part = None if text is None else self._text.write(text, module.classes, folder, before, device)
            shipped = images[: min(GOLDEN_IMAGES, len(check_images))]
            embedding, logits, probabilities = (values[: len(shipped)] for values in expected[0])
            answers = {"images": shipped, "embedding": embedding, "logits": logits, "probabilities": probabilities}
            files = golden.encoded()
            arrays: dict[str, NDArray[Any]] = {**answers, **files, golden.PIXELS: golden.pixels(files, preprocess)}
            np.savez(folder / GOLDEN, allow_pickle=False, **arrays)
            release = Release(
                path=folder,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                classes=tuple(module.classes),
                preprocess=preprocess,
                facts=dict(facts),
                opset=self._opset,
                ir_version=model.ir_version,
                precision=FP32,
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

    def _write_model(
        self,
        module: Any,
        metadata: Mapping[str, str],
        folder: Path,
        device: Device,
        images: NDArray[np.float32],
        expected: Sequence[Answers],
        seconds: dict[str, float],
    ) -> tuple[ir.Model, Parity]:
        """Write the model in fp32 and hold it to `expected`, the module's own answers to `images`. Raises ParityError,
        ReleaseError."""
        tensors = tensors_of(module)

        def attempt(template: ir.Model) -> tuple[ir.Model, Parity]:
            with _timed(seconds, "write"):
                widths = [values.shape[1] for values in expected[0]]
                model = filled(template, {name: constant(name, tensor) for name, tensor in tensors.items()}, widths)
                model.metadata_props.update(metadata)
                size = sum(tensor.nbytes for tensor in tensors.values())
                ir.save(model, folder / MODEL, external_data=f"{MODEL}.data" if size > SINGLE_FILE_BYTES else None)
            with _timed(seconds, "check"):
                session = Session(folder / MODEL, device=device, threads=self._threads)
                parity = compare(session, images, expected, (*SMALL_BATCHES, len(images)))
            judge(parity, self._fp32)
            return model, parity

        made = self._model.fitting(module, tensors, module.class_tensors, images[:EXAMPLE_BATCH], 0, attempt)
        seconds["trace"] = self._model.seconds
        return made

    def _write_variant(
        self,
        precision: str,
        folder: Path,
        device: Device,
        images: NDArray[np.float32],
        expected: Answers,
        holdout: Sequence[Labelled],
    ) -> Variant:
        """Write the model in a smaller precision beside the one in fp32. Its files are removed again when it is not
        close enough, or could not be made; the result then says why."""
        form = PRECISIONS[precision]
        path = folder / variant_name(precision)
        parity = accuracy = accuracy_fp32 = refused = None
        try:
            form.convert(folder / MODEL, path, SINGLE_FILE_BYTES)
            session = Session(path, device="cpu" if form.cpu_only else device, threads=self._threads)
            parity = compare(session, images, [expected], (*SMALL_BATCHES, len(images)))
            if holdout:
                accuracy = _accuracy(session, holdout)
                accuracy_fp32 = _accuracy(Session(folder / MODEL, device=device, threads=self._threads), holdout)
            # After the accuracy, so that release.json has it also for a variant that is left out.
            judge(parity, form.tolerance)
            if accuracy is not None and accuracy_fp32 is not None and accuracy_fp32 - accuracy > MAX_ACCURACY_DROP:
                refused = f"accuracy on the hold-out is {accuracy:.1%}, and {accuracy_fp32:.1%} in fp32"
        except (OSError, MemoryError):  # the machine's fault says nothing of the form: the task is tried again
            raise
        except Exception as error:  # converters and onnxruntime share no base class; fp32 is released all the same
            refused = str(error) if isinstance(error, ParityError) else f"{type(error).__name__}: {error}"
        if refused is not None:
            log.warning("the release has no %s form: %s", precision, refused)
            for file in folder.glob(f"{path.name}*"):
                file.unlink()
        return Variant(parity, form.tolerance.atol, accuracy, accuracy_fp32, refused)


def _accuracy(session: Session, holdout: Sequence[Labelled]) -> float:
    """Give the share of the images that the session answers right, 0 to 1."""
    right = sum(int((session.run(images).probabilities.argmax(1) == labels).sum()) for images, labels in holdout)
    return right / sum(len(labels) for _, labels in holdout)


@contextmanager
def _made_whole(folder: Path) -> Iterator[None]:
    """Make `folder`, and remove it again when the block fails: whoever looks finds a whole release or none."""
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long the block took. When a phase is done again (see Trace.fitting), the last time counts."""
    began = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - began
