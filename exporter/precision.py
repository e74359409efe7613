"""The precisions a model is released in beside fp32. To add one, write its converter here and its line of PRECISIONS.

Every converted model keeps float32 inputs and outputs, and everything from the embedding on (similarities,
temperatures, softmax) in float32: rounding there moves answers, and saves nothing.

The configuration checks its keys against this table in processes that have no use for onnx, so the converters import
it themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

FP32 = "fp32"
"""The precision every release has: the other ones are made from it and compared with it."""

AUTO = "auto"
"""What a reader asks for to answer in the form that is fastest on its machine (see exporter.fastest)."""

MIN_GAIN = 1.3
"""A smaller form must answer this many times as fast as fp32 at every batch size that is timed, since it may answer up
to a point fewer images right. Chosen by hand between the bundled model's int8, 1.05 to 1.18 times as fast on 2 busy
cores, and that of ViT-B/32 at 2.1 to 2.3: a limit near either would choose now one form and now the other."""

FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceL2", "ReduceSum", "Div", "Exp", "Log", "Pow", "Sqrt", "Gelu")
"""Operators that fp16 leaves alone: their sums and quotients overflow or lose everything in half precision (reports:
onnxruntime#11384, TensorRT#4111). Gelu because onnxruntime 1.31 on a CPU dies of a segmentation fault when it fuses a
half-precision one."""

INTEGER_OPS = ["MatMul", "Gemm"]
"""Operators whose weights int8 stores as integers. Convolutions stay float32: they are small here, and slower in
integers."""


@dataclass(frozen=True)
class Tolerance:
    """How far onnxruntime's answers may be from torch's (see exporter.release.Parity)."""

    atol: float
    """Largest difference in embeddings and probabilities."""
    logits: float
    """Largest difference in logits, relative to the largest."""
    cosine: float
    """Smallest cosine between the two embeddings of an image, -1 to 1."""
    top1: float
    """Smallest share of images for which both give the same class first, 0 to 1."""


@dataclass(frozen=True)
class Precision:
    """How a model is made smaller, how near to the original it must stay, and where it runs."""

    convert: Callable[[Path, Path, int], None]
    """Reads the fp32 model in the first file and writes the converted one into the second, whose weights go to a second
    file (the name and `.data`) where the whole has more than the given number of bytes. May raise anything: the release
    is then made without it."""
    tolerance: Tolerance
    """What the converted model is held to."""
    cpu_only: bool
    """Whether it is made for CPUs alone: it is then checked on the CPU, wherever the model was trained."""
    suits: str
    """What it is for, a word for the configuration's example file."""


def _to_fp16(source: Path, target: Path, single_file_bytes: int) -> None:
    """Write the model with weights and arithmetic in half precision."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(source)
    # Shape inference inside the converter needs one protobuf of the whole model, which ends at 2 GiB.
    large = model.ByteSize() > single_file_bytes
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=large,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS],
        node_block_list=_after_embedding(model),
    )
    # The converter repeats the same cast for every reader of a value, which onnxruntime refuses.
    nodes, seen = [], set()
    for node in half.graph.node:
        if node.output[0] not in seen:
            nodes.append(node)
        seen.add(node.output[0])
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    _save(half, target, single_file_bytes)


def _to_int8(source: Path, target: Path, single_file_bytes: int) -> None:
    """Write the model with the weights of its matrix products as 8-bit integers; activations are quantized when they
    come, so no images are needed to calibrate them."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    with tempfile.TemporaryDirectory() as scratch:
        # Weights reach their products through transpositions, where the quantizer does not find them. A session folds
        # those and writes the graph; levels above the basic one would fuse it into operators of onnxruntime's own.
        folded = Path(scratch) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{folded.name}.data"
        )
        options.log_severity_level = 3  # errors only
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = onnx.load(folded)
        # The quantizer warns of every model without this mark, which says that it was folded as above.
        add_pre_process_metadata(model)
        quantized = Path(scratch) / "quantized.onnx"
        quantize_dynamic(
            model,
            quantized,
            op_types_to_quantize=INTEGER_OPS,
            nodes_to_exclude=_after_embedding(model),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=model.ByteSize() > single_file_bytes,
        )
        _save(onnx.load(quantized), target, single_file_bytes)


def _after_embedding(model: onnx.ModelProto) -> list[str]:
    """Give the names of the nodes that read the embedding, directly or not."""
    reached = {"embedding"}
    names = []
    for node in model.graph.node:  # in topological order
        if reached & set(node.input):
            reached.update(node.output)
            names.append(node.name)
    return names


def _save(model: onnx.ModelProto, path: Path, single_file_bytes: int) -> None:
    import onnx

    large = model.ByteSize() > single_file_bytes
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data")


PRECISIONS = {
    "fp16": Precision(_to_fp16, Tolerance(0.02, logits=0.05, cosine=0.999, top1=0.95), cpu_only=False, suits="GPUs"),
    "int8": Precision(_to_int8, Tolerance(0.1, logits=0.1, cosine=0.98, top1=0.9), cpu_only=True, suits="CPUs"),
}
"""Every precision that can be asked for beside fp32, by its name in the configuration and in file names.

The tolerances were chosen by hand and are wide: they catch a conversion that broke the model. What a precision costs is
judged by the accuracy on held-out images (exporter.onnx.MAX_ACCURACY_DROP). int8 is for CPUs alone because onnxruntime
has kernels for dynamically quantized products only there."""
