"""Smaller forms of a released model: half precision for GPUs, 8-bit integers for CPUs.

Both keep float32 inputs and outputs, and everything from the embedding on (similarities, temperatures, softmax) in
float32: rounding there moves answers, and saves nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceL2", "ReduceSum", "Div", "Exp", "Log", "Pow", "Sqrt", "Gelu")
"""Left alone by `fp16`: their sums and quotients overflow or lose everything in half precision. Gelu because
onnxruntime 1.31 on a CPU dies of a segmentation fault when it fuses a half-precision one."""


def fp16(source: Path, target: Path, single_file_bytes: int) -> None:
    """Write `source` with weights and arithmetic in half precision; larger than `single_file_bytes`, weights go to
    a file beside it."""
    model = onnx.load(source)
    # shape inference inside the converter needs one protobuf of the whole model, which ends at 2 GiB
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


def int8(source: Path, target: Path, single_file_bytes: int) -> None:
    """Write `source` with the weights of its matrix products as 8-bit integers; activations are quantized as they come.
    Convolutions stay float32: they are small here, and slower in integers."""
    with tempfile.TemporaryDirectory() as scratch:
        # Weights reach their products through transpositions; folded, they can be found.
        folded = Path(scratch) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{folded.name}.data"
        )
        options.log_severity_level = 3
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = onnx.load(folded)
        add_pre_process_metadata(model)  # it has been, and else there is a warning
        quantized = Path(scratch) / "quantized.onnx"
        quantize_dynamic(
            model,
            quantized,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=_after_embedding(model),
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=model.ByteSize() > single_file_bytes,
        )
        _save(onnx.load(quantized), target, single_file_bytes)


def _after_embedding(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that read the embedding, directly or not."""
    reached = {"embedding"}
    names = []
    for node in model.graph.node:  # in topological order
        if reached & set(node.input):
            reached.update(node.output)
            names.append(node.name)
    return names


def _save(model: onnx.ModelProto, path: Path, single_file_bytes: int) -> None:
    large = model.ByteSize() > single_file_bytes
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data")
