"""A torch module as an ONNX graph without weights: traced once per structure, kept, then filled for each release."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import onnx_ir as ir
import onnxscript
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporter import attention, pooling
from exporter.release import ParityError, ReleaseError
from exporter.trace_cache import TraceCache, digest_of, key_of

log = logging.getLogger(__name__)

T = TypeVar("T")

_EXAMPLE_CLASSES = 3
"""Classes in the example that is traced: neither 0 nor 1, which torch.export takes for constants."""

EXAMPLE_BATCH = 2
"""Images or texts in the example that is traced: a batch of one exports, passes onnx's checker and fails at three
(pytorch#157621)."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Collect every parameter and buffer by its name; a shared one under all its names, as the trace may pick any of
    them.
    """
    return {
        **{name: tensor.detach() for name, tensor in module.named_parameters(remove_duplicate=False)},
        **{name: tensor.detach() for name, tensor in module.named_buffers(remove_duplicate=False)},
    }


class Trace:
    """A trace is the graph of one kind of module, without weights. It is traced when a module of another structure
    comes, unless a cache has its graph.
    """

    def __init__(self, opset: int, source: str, outputs: Sequence[str], cache: TraceCache | None = None) -> None:
        """`opset`: ONNX operator set of the graph; `source` and `outputs`: names of its input and outputs; `cache`:
        where graphs of this and other processes are kept."""
        self._opset = opset
        self._source = source
        self._outputs = outputs
        self._cache = cache
        self._structure: object = None
        self._graph: ir.Model | None = None
        self.seconds = 0.0
        """Wall seconds that the newest `fitting` spent on tracing, or on reading what was traced; about 0 when an
        earlier trace was used again."""

    def fitting(
        self,
        module: Any,
        tensors: Mapping[str, Tensor],
        varying: Sequence[str],
        example: NDArray[Any],
        longest: int,
        attempt: Callable[[ir.Model], T],
    ) -> T:
        """Give what `attempt` makes of the graph of `module`, which is traced only where no earlier trace fits.

        A trace fits when modules have the same type and shapes, and `attempt` raises no ParityError: a number kept
        outside the tensors is part of the graph, and only the answers show that it changed. Then it is traced anew. So
        is a graph from the cache with which anything goes wrong that is not the machine's fault.

        `tensors`: those of `module` (`tensors_of`). `varying`: names of tensors whose first dimension is left open, as
        is that of `example` (EXAMPLE_BATCH inputs). `example`'s second dimension is left open too, up to `longest`,
        unless that is 0. Raises ReleaseError when torch cannot trace the module, and what `attempt` raises.
        """
        self.seconds = 0.0
        structure = (type(module), example.shape[1:], _shapes(tensors, frozenset(varying)))
        if self._graph is not None and structure == self._structure:
            try:
                return attempt(self._graph)
            except ParityError as error:
                log.warning("the graph traced earlier does not fit this model, another is taken: %s", error)
        began = time.monotonic()
        key = None if self._cache is None else key_of(module, self._asked(tensors, varying, example, longest), __file__)
        kept = None if self._cache is None or key is None else self._cache.get(key)
        self.seconds = time.monotonic() - began
        if self._cache is not None and key is not None and kept is not None:
            try:
                made = attempt(kept)
                self._graph, self._structure = kept, structure
                return made
            except (OSError, MemoryError):
                raise
            except Exception as error:  # onnxruntime's errors share no base class
                log.warning("the graph that was kept does not fit this model, it is traced anew: %s", error)
                self._cache.drop(key)
        began = time.monotonic()
        self._graph, self._structure = self._traced(module, varying, example, longest), structure
        self.seconds += time.monotonic() - began
        made = attempt(self._graph)
        if self._cache is not None and key is not None:
            self._cache.put(key, self._graph)
        return made

    def _asked(self, tensors: Mapping[str, Tensor], varying: Sequence[str], example: NDArray[Any], longest: int) -> Any:
        """Give all that a graph depends on but the module itself, JSON-able."""
        shapes = [[name, shape, str(kind), free] for name, shape, kind, free in _shapes(tensors, frozenset(varying))]
        example_of = [str(example.dtype), example.shape[1:]]
        rewritten = [digest_of(str(part.__file__)) for part in (attention, pooling)]
        return [rewritten, self._opset, self._source, list(self._outputs), list(varying), longest, example_of, shapes]

    def _traced(self, module: Any, varying: Sequence[str], example: NDArray[Any], longest: int) -> ir.Model:
        dimensions = {0: torch.export.Dim("batch", min=1)}
        if longest:
            dimensions[1] = torch.export.Dim("length", min=2, max=longest)
        module = copy.deepcopy(module).cpu().eval()
        attention.plain(module)
        tensors = [getattr(module, name) for name in varying]
        tensors = [tensor[torch.arange(_EXAMPLE_CLASSES) % len(tensor)] for tensor in tensors]
        classes = torch.export.Dim("classes", min=1)
        try:
            with warnings.catch_warnings(), _silenced("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    _VaryingAsInputs(module, varying).eval(),
                    (torch.from_numpy(example.copy()), tensors),
                    dynamo=True,
                    # Constant folding would swallow weights that later releases must replace.
                    optimize=False,
                    verbose=False,
                    opset_version=self._opset,
                    input_names=[self._source, *varying],
                    output_names=list(self._outputs),
                    dynamic_shapes=(dimensions, [{0: classes} for _ in tensors]),
                )
        except torch.onnx.OnnxExporterError as error:
            found = str(error.__cause__ or error).splitlines()[0]
            raise ReleaseError(f"torch cannot trace {type(module).__name__} ({found}); not released") from error
        assert program is not None
        return _without_weights(program.model)


def filled(template: ir.Model, weights: Mapping[str, Any], widths: Sequence[int]) -> ir.Model:
    """Fill the template with `weights` (onnx_ir tensors by name) and [batch, width] as the shape of each output."""
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


def constant(name: str, tensor: Tensor) -> ir.TensorProtocol:
    """Give a torch tensor as onnx_ir takes it."""
    return ir.tensor(tensor.cpu().contiguous().numpy(), name=name)


class _VaryingAsInputs(nn.Module):
    """This is `module` with its varying tensors as arguments, so that the trace leaves their first dimension open."""

    def __init__(self, module: Any, varying: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.varying = varying

    def forward(self, source: Tensor, varying: list[Tensor]) -> Any:
        replaced = dict(zip(self.varying, varying, strict=True))
        return torch.func.functional_call(self.module, replaced, (source,))


def _shapes(tensors: Mapping[str, Tensor], varying: frozenset[str]) -> tuple:
    return tuple(
        (name, tuple(tensor.shape)[1:] if name in varying else tuple(tensor.shape), tensor.dtype, name in varying)
        for name, tensor in tensors.items()
    )


def _without_weights(model: ir.Model) -> ir.Model:
    """Give the traced graph with every parameter and buffer as an input of the graph, under the module's own name."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith("module."):
            del graph.initializers[name]
            value.const_value = None
            value.name = name.removeprefix("module.")
            graph.inputs.append(value)
    # What hangs on no weight is folded here: the casts left by the tracer would keep onnxruntime from merging batch
    # norms into convolutions (a convolutional trunk took 2.4 times as long for an image).
    with _silenced("onnxscript", "onnx_ir"):
        onnxscript.optimizer.optimize(model)
    pooling.take_early(model)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with this machine's paths
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = None  # onnxruntime infers it, with the number of classes known
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in graph.outputs:
        value.shape = ir.Shape([None, None])  # onnx's checker wants one; `filled` says which
    return model


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
