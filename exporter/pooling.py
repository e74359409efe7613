"""Takes the token that an image's features come from as early in a traced graph as it can be taken.

A vision transformer answers with one token of its last block. Up to that block's attention every token counts; from
there on each goes its own way, and what the other ones (196 of 197 in a ViT-B/16) are computed for is thrown away. The
graph that is released leaves them out: the same answers for a twelfth less work in twelve blocks, whoever runs it.
"""

from __future__ import annotations

import onnx_ir as ir

_TOKENS = 1
"""Dimension of the tokens in activations [batch, tokens, width]."""

_RANK = 3
"""Dimensions of such activations."""

_ALONE = frozenset({"Add", "Mul", "MatMul", "LayerNormalization", "Gelu", "Sigmoid", "Tanh", "Erf", "Relu"})
"""Operators that act on each token alone where their other operands are alike for all tokens."""


def take_early(model: ir.Model) -> None:
    """Move every choice of one token, by a constant index, before all that acts on each token alone and that nothing
    else reads. Shapes of the values must be known; those of what is moved over are not kept."""
    for node in list(model.graph):
        if node.op_type == "Gather" and _is_choice(node):
            _move(model.graph, node)


def _is_choice(gather: ir.Node) -> bool:
    """Whether a Gather takes one token, which then has no dimension of its own any more."""
    data, index = gather.inputs
    if data is None or index is None or _rank(data) != _RANK or gather.attributes.get_int("axis", 0) != _TOKENS:
        return False
    scalar = index.const_value is not None and index.const_value.shape.rank() == 0
    return scalar and not gather.outputs[0].is_graph_output()  # whose name must stay


def _move(graph: ir.Graph, gather: ir.Node) -> None:
    data, index = gather.inputs
    assert data is not None and data.shape is not None
    length = data.shape[_TOKENS]
    moved: dict[ir.Node, list[int]] = {}  # what will see one token -> which of its inputs have tokens
    waiting = [data]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or node in moved or value.is_graph_output():
            continue
        if any(user is not gather and user not in moved for user, _ in value.uses()):
            continue  # another one needs all tokens; or will be moved, and then asks again
        if (inputs := _with_tokens(node, length)) is not None:
            moved[node] = inputs
            waiting += [one for place in inputs if (one := node.inputs[place]) is not None]
    if not moved:
        return
    taken: dict[ir.Value, ir.Value] = {}
    for node, places in moved.items():
        for place in places:
            all_tokens = node.inputs[place]
            assert all_tokens is not None
            source = all_tokens.producer()
            assert source is not None
            if source in moved:
                continue
            if all_tokens not in taken:
                early = ir.node(
                    "Gather", [all_tokens, index], {"axis": _TOKENS}, name=f"{gather.name}_early_{len(taken)}"
                )
                early.outputs[0].name = f"{gather.outputs[0].name}_early_{len(taken)}"
                graph.insert_after(source, early)
                taken[all_tokens] = early.outputs[0]
            node.replace_input_with(place, taken[all_tokens])
        for output in node.outputs:
            output.shape = None
    ir.convenience.replace_all_uses_with(gather.outputs[0], data)
    graph.remove(gather, safe=True)


def _with_tokens(node: ir.Node, length: object) -> list[int] | None:
    """Give the places of a node's inputs that have `length` tokens; None where it does not act on each alone."""
    if node.op_type not in _ALONE or node.domain:
        return None
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, _RANK - 1):
        return None
    places = []
    for place, value in enumerate(node.inputs):
        if value is None:
            continue
        rank, shape = _rank(value), value.shape
        weights = node.op_type == "MatMul" and place == 1
        if weights and rank == _RANK - 1:
            continue
        if rank is None or shape is None or weights:
            return None
        if rank == _RANK and shape[_TOKENS] == length and value.producer() is not None:
            places.append(place)
        elif rank > 1:  # not alike for all tokens, as positions are
            return None
    return places


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else value.shape.rank()
