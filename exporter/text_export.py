"""Writes the text part of a release: the text tower's graph, the learned classes' embeddings and the tokenizer.

Most of a text tower never changes while a method learns. Those weights are in a file of their own, which is hard-linked
from release to release instead of written again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.files import link_or_copy
from exporter.precision import Tolerance
from exporter.release import TEXT, TEXT_ROWS, TOKENIZER, ParityError, ReleaseError, TextPart, digest
from exporter.session import Device
from exporter.tensors import Unchanged
from exporter.text import name_encoder
from exporter.trace import EXAMPLE_BATCH, Trace, constant, filled, tensors_of
from exporter.trace_cache import TraceCache

log = logging.getLogger(__name__)

_CHECK_NAMES = ("zebra", "a snow-covered mountain hut, seen from far away", "Größenmaßstab 3,5", "thing")
"""Names that are compared in every release, few of which were learned: of one and of many tokens, with letters outside
ASCII, with digits and punctuation, where tokenizers go wrong."""

_CHECK_CLASSES = 12
"""Learned classes, the newest, that are compared too. Chosen by hand: more only take longer, and what is wrong with one
is as a rule wrong with all."""

_NAMES_AT_ONCE = 64
"""Names that go through torch's text tower at once, to bound the memory of its activations."""

_PAGE = 4096
"""Bytes that offsets of external weights are multiples of, as onnx.proto asks, so that readers can map the file."""


@dataclass(frozen=True)
class TextToRelease:
    """What the text part of a release is made of."""

    module: Any
    """Module that takes token ids int64 [n, L] to embeddings [n, D], L2-normalised. It has `prompt` and `scale` (see
    exporter.release.TextPart), `tokenize(names)` that gives ids, and two sets of tensor names: `varying`, whose first
    dimension changes between releases, and `frozen`, which never change."""
    tokenizer: Callable[[], tuple[str, str]]
    """Gives the JSON of the library `tokenizers`, and the name in exporter.text.CLEANUPS of what comes before it. May
    raise, saying why there is none."""


class TextExporter:
    """Makes text parts. It keeps the traced graph, without weights, between them. Not thread-safe."""

    def __init__(self, opset: int, tolerance: Tolerance, threads: int, traces: TraceCache | None = None) -> None:
        """`opset`: ONNX operator set; `tolerance`: what the embeddings of names are held to; `threads`: CPU threads of
        onnxruntime during the check, 0 for all cores; `traces`: where traced graphs are kept on disk."""
        self._tolerance = tolerance
        self._threads = threads
        self._trace = Trace(opset, "ids", ("embedding",), traces)
        self._frozen: tuple[object, tuple[int, str]] | None = None
        """The frozen tensors (names and addresses), and size and sha256 of the file they make: they are not read
        through again for every release."""
        self._same_tower = Unchanged()
        self._prompt = ""
        self._rows: dict[tuple[str, ...], NDArray[np.float32]] = {}
        """Names, _NAMES_AT_ONCE together -> the embeddings that this tower has given of them under this prompt."""

    def write(
        self, tower: TextToRelease, classes: Sequence[str], folder: Path, before: Path | None, device: Device
    ) -> TextPart:
        """Write the text part of a model with these classes into the release's `folder`, and check it on `device`.

        Its files are removed again when onnxruntime's embeddings are not torch's or anything else goes wrong; the
        result then says why. `before`: folder of an earlier release, with which equal files are shared.
        """
        module = tower.module
        difference = cosine = refused = None
        clean = ""

        def attempt(template: ir.Model) -> None:
            nonlocal difference, cosine
            self._write_graph(template, tensors, module.frozen, expected.shape[1], folder, before)
            encode = name_encoder(folder, module.prompt, clean, device, self._threads)
            # Batches of one, of three and of the rest, for the same reason as in exporter.parity.compare.
            got = np.concatenate([encode(names[:1]), encode(names[1:4]), encode(names[4:])])
            difference = float(np.abs(got - expected).max())
            cosine = float((got * expected).sum(axis=1).min())
            if not (difference <= self._tolerance.atol and cosine >= self._tolerance.cosine):
                raise ParityError(
                    f"embeddings of {len(names)} names differ by {difference:.3g}, at most {self._tolerance.atol:g} is "
                    f"allowed, their smallest cosine is {cosine:.6g}, expected at least {self._tolerance.cosine}"
                )

        try:
            tensors = tensors_of(module)
            rows = self._embeddings(module, tensors, classes)
            names = [*classes[-_CHECK_CLASSES:], *_CHECK_NAMES]
            expected = np.concatenate([rows[-_CHECK_CLASSES:], _embeddings(module, _CHECK_NAMES)])
            np.save(folder / TEXT_ROWS, rows)
            json_text, clean = tower.tokenizer()
            tokenizer = json_text.encode()
            _share(folder / TOKENIZER, before, (len(tokenizer), hashlib.sha256(tokenizer).hexdigest()), [tokenizer])
            ids = module.tokenize(names[:EXAMPLE_BATCH]).cpu().numpy()
            # A token shorter than the longest: to the tracer its length and the tower's own are two numbers.
            self._trace.fitting(module, tensors, module.varying, ids[:, :-1], ids.shape[1], attempt)
        except (OSError, MemoryError):  # the machine's fault says nothing of the text tower: the task is tried again
            raise
        except Exception as error:  # torch and tokenizers share no base class; the model is released all the same
            refused = str(error) if isinstance(error, ReleaseError) else f"{type(error).__name__}: {error}"
            log.warning("the release has no text part: %s", refused)
            for file in (*folder.glob("text.*"), folder / TOKENIZER):
                file.unlink(missing_ok=True)
        return TextPart(module.prompt, clean, module.scale, difference, cosine, self._tolerance.atol, refused)

    def _embeddings(self, module: Any, tensors: Mapping[str, Tensor], classes: Sequence[str]) -> NDArray[np.float32]:
        """Give the text module's own answers, float32 [n, D]. Classes come at the end, so that what was asked together
        before is so again, and the answers are the same bits, whether or not they were kept."""
        if not self._same_tower(tensors) or self._prompt != module.prompt:
            self._rows, self._prompt = {}, module.prompt
        parts = [tuple(classes[at : at + _NAMES_AT_ONCE]) for at in range(0, len(classes), _NAMES_AT_ONCE)]
        self._rows = {
            names: self._rows[names] if names in self._rows else _embeddings(module, names) for names in parts
        }
        return np.concatenate(list(self._rows.values()))

    def _write_graph(
        self,
        template: ir.Model,
        tensors: Mapping[str, Tensor],
        frozen: frozenset[str],
        width: int,
        folder: Path,
        before: Path | None,
    ) -> None:
        """Write the text tower's graph with the weights that learning changes, and beside it the file of the others."""
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


def _pages(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """Yield the tensors' bytes, each tensor's filled up to whole pages."""
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
    """Give the text module's own answers to a few names, float32 [n, D]."""
    with torch.no_grad():
        return module(module.tokenize(names)).float().cpu().numpy()
