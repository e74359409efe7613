"""The token that an image's features come from is taken before what acts on each token alone; answers stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import parser, shape_inference

from exporter import pooling

TOKENS = 5

BLOCK = """
    n = LayerNormalization<axis=-1>(x, scale, bias)
    m = MatMul(n, up)
    a = Add(m, more)
    g = Gelu(a)
    d = MatMul(g, down)
    r = Add(x, d)
"""
"""What follows attention in a block, with its residual; `x` is what attention gives."""


def graph(body: str, outputs: str = "float[N, 4] y") -> onnx.ModelProto:
    """`body` computes `r` [N, 5, 4] of `x`, and `y` is its token 0."""
    text = f"""
        <ir_version: 10, opset_import: ["": 20]>
        toy (float[N, {TOKENS}, 4] images) => ({outputs})
        <int64 first = {{0}}, float[4] scale = {{1, 2, 1, 2}}, float[4] bias = {{0, 1, 0, -1}}>
        {{
            x = Sigmoid(images)
            {body}
            one = Gather<axis=1>(r, first)
            y = Identity(one)
        }}
    """
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    shapes = {"up": (4, 8), "more": (8,), "down": (8, 4), "positions": (TOKENS, 4), "square": (TOKENS, TOKENS)}
    for name, shape in shapes.items():
        if name in body:
            model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype("f"), name))
    return shape_inference.infer_shapes(model)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    pooling.take_early(graph)
    return ir.to_proto(graph)


def answers(model: onnx.ModelProto) -> list[np.ndarray]:
    images = np.random.default_rng(1).normal(size=(3, TOKENS, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def taken(model: onnx.ModelProto) -> list[str]:
    return [node.input[0] for node in model.graph.node if node.op_type == "Gather"]


def test_a_block_is_computed_for_the_one_token_and_answers_the_same():
    model = graph(BLOCK)
    early = rewritten(model)

    assert taken(model) == ["r"] and taken(early) == ["x"]
    assert len(early.graph.node) == len(model.graph.node)
    np.testing.assert_allclose(answers(early)[0], answers(model)[0], atol=1e-6)


def test_what_another_one_reads_keeps_all_tokens():
    body = f"{BLOCK.replace('r =', 'inner =')} other = ReduceSum(inner)\n r = Add(inner, x)"
    model = graph(body, "float[N, 4] y, float[1, 1, 1] other")
    early = rewritten(model)

    assert sorted(taken(early)) == ["inner", "x"]
    for got, want in zip(answers(early), answers(model), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "r = Add(x, positions)",
        "r = MatMul(square, x)",
        "t = Transpose<perm=[0, 2, 1]>(x)\n p = MatMul(x, t)\n r = MatMul(p, x)",
        "r = Softmax<axis=1>(x)",
        "r = LayerNormalization<axis=1>(x, positions)",
    ],
    ids=["positions", "a mixture of tokens", "attention", "a sum over tokens", "a norm over tokens"],
)
def test_what_differs_between_tokens_or_mixes_them_stays_before(body):
    model = graph(body)
    early = rewritten(model)

    assert taken(early) == ["r"]
    np.testing.assert_array_equal(answers(early)[0], answers(model)[0])


def test_a_graph_of_unknown_shapes_stays_as_it_is():
    model = graph(BLOCK)
    del model.graph.value_info[:]

    assert taken(rewritten(model)) == ["r"]
