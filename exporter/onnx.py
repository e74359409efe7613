"""Turns an inference module, and the text tower that belongs to it, into a checked release.

Each graph is traced with its weights as inputs, once per structure; a release fills them in. So the first release of a
process takes seconds, later ones, also with more classes, only the time to write and check them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from exporter.files import link_or_copy
from exporter.parity import ParityError, Tolerance, compare, judge, reference_answers
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
from exporter.trace import Trace, constant, filled, tensors_of

log = logging.getLogger(__name__)

SINGLE_FILE_BYTES = 1_800_000_000
"""Larger weights go to a second file: protobuf ends at 2 GiB."""
GOLDEN_IMAGES = 4
MAX_ACCURACY_DROP = 0.01
"""Of a smaller form against fp32, on the hold-out."""
_CHECK_NAMES = ("zebra", "a snow-covered mountain hut, seen from far away", "Größenmaßstab 3,5", "thing")
"""Beside learned classes: names of one and of many tokens, few of which were learned."""
_CHECK_CLASSES = 12
_PAGE = 4096


Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Preprocessed images [B, 3, H, W] and the number of each one's class [B]."""


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
        self._model = Trace(opset, "images", OUTPUTS)
        self._text = Trace(opset, "ids", ("embedding",))
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
        tensors = tensors_of(module)
        images = check_images[np.arange(self._max_batch) % len(check_images)]
        expected = reference_answers(module, images)
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
            model = filled(template, {name: constant(name, tensor) for name, tensor in tensors.items()}, widths)
            model.metadata_props.update(metadata)
            size = sum(tensor.nbytes for tensor in tensors.values())
            ir.save(model, folder / MODEL, external_data=f"{MODEL}.data" if size > SINGLE_FILE_BYTES else None)
            written = time.monotonic()
            session = Session(folder / MODEL, device=device, threads=self._threads)
            parity = compare(session, images, expected, (1, 3, self._max_batch))
            seconds.update(write=written - traced, check=time.monotonic() - written)
            judge(parity, self._fp32)
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
            tensors = tensors_of(module)
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
        weights: dict[str, Any] = {name: constant(name, t) for name, t in tensors.items() if name not in frozen}
        path = folder / f"{TEXT}.data"
        size = 0
        for name, tensor in apart.items():
            kind, shape = constant(name, tensor).dtype, ir.Shape(tensor.shape)
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
        ir.save(filled(template, weights, [width]), folder / TEXT)

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
            judge(parity, tolerance)
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


def _pages(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """Their bytes, each tensor's filled up to whole pages, which onnxruntime can map."""
    for tensor in tensors:
        data = tensor.cpu().contiguous().numpy().tobytes()
        yield data
        yield bytes(-len(data) % _PAGE)


def _share(path: Path, before: Path | None, wanted: tuple[int, str], pieces: Iterable[bytes]) -> None:
    """Put a file of this size and sha256 at `path`: the one in the folder `before`, or else `pieces`."""
    path.unlink(missing_ok=True)  # never written through: other releases may have the same file
    same = before and before / path.name
    try:
        if same and digest(same) == wanted:
            link_or_copy(same, path)
            return
    except OSError:
        pass  # there is none, or it cannot be read: it is written
    with path.open("wb") as file:
        file.writelines(pieces)


def _embeddings(module: Any, names: Sequence[str]) -> NDArray[np.float32]:
    """The text module's own answers, float32 [n, D]."""
    with torch.no_grad():
        parts = [module(module.tokenize(names[i : i + 64])) for i in range(0, len(names), 64)]
    return torch.cat(parts).float().cpu().numpy()
