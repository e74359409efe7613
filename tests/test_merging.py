"""Merged learners are the one that saw all their streams: whatever their order, and nothing that is not exact."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agent import config, methods
from agent.methods.base import LearnerState, Method, TaskData
from agent.methods.merging import ALIKE, AVERAGED, MERGED, MergeError, adapted, images, merge
from agent.model.clip import Clip
from tests.tiny import silent, tiny_clip, tiny_task

ADDITIVE = ("gapstream", "ncm", "ranpac")
OF_CLASSES = ("means", "embeddings", "sums")
"""What methods add up, a row for each class."""

OF_ALL = ("scatter", "gram")
"""What methods add up over all classes."""


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture(params=ADDITIVE)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def built(clip: Clip, name: str = "gapstream", seed: int = 0, **settings: Any) -> Method:
    sections = {"gapstream": {"features": 40, "prior_images": 7, "drift_budget": 0}, "ranpac": {"features": 40}}
    section = {**sections.get(name, {}), **settings}
    return methods.build(clip, config.Method(name=name, seed=seed, **({name: section} if section else {})))


def taught(method: Method, *tasks: TaskData) -> Method:
    for task in tasks:
        method.update(task, silent)
    return method


def state_of(clip: Clip, name: str, *tasks: TaskData) -> LearnerState:
    return taught(built(clip, name), *tasks).state()


def streams(clip: Clip) -> list[list[TaskData]]:
    """Those of three learners: two have a class in common, and one comes again in the same stream."""
    return [
        [tiny_task(clip, 1, ["red", "green"]), tiny_task(clip, 2, ["blue", "red"], per_class=5, seed=1)],
        [tiny_task(clip, 1, ["black", "green", "white"], per_class=7, seed=2)],
        [tiny_task(clip, 1, ["pink"], per_class=3, seed=3), tiny_task(clip, 2, ["red"], per_class=1, seed=4)],
    ]


def named(states: Sequence[LearnerState]) -> dict[str, LearnerState]:
    return {f"site {number}": state for number, state in enumerate(states)}


def assert_same(one: LearnerState, other: LearnerState) -> None:
    """Counts and all else that is no sum exactly, sums within rounding."""
    assert one.values == other.values and one.tensors.keys() == other.tensors.keys()
    for key, tensor in one.tensors.items():
        if key in ("counts", "ridge"):
            assert torch.equal(tensor, other.tensors[key])
        torch.testing.assert_close(other.tensors[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_the_merged_learner_has_what_one_that_saw_all_streams_has(clip, name):
    # given learners of three streams, and one that learns all tasks
    apart = [state_of(clip, name, *tasks) for tasks in streams(clip)]
    whole = state_of(clip, name, *itertools.chain(*streams(clip)))

    # when
    merged = merge(name, named(apart))

    # then classes are sorted, their counts are exact and the rest is within rounding
    assert merged.values["classes"] == sorted(whole.values["classes"])
    assert images(merged) == {name: images(whole)[name] for name in merged.values["classes"]}
    rows = [whole.values["classes"].index(name) for name in merged.values["classes"]]
    added = [key for key in (*OF_CLASSES, *OF_ALL) if key in merged.tensors]
    assert added
    for key in added:
        expected = whole.tensors[key][rows] if key in OF_CLASSES else whole.tensors[key]
        torch.testing.assert_close(merged.tensors[key], expected, rtol=1e-4, atol=1e-4)


def test_the_merged_learner_answers_and_goes_on_as_one_that_saw_all_streams(clip, name):
    # given a merged learner, and one that learned everything, with those numbers that do not add up made the same
    first, second, third = streams(clip)
    merged, whole = built(clip, name), taught(built(clip, name), *first, *second, *third)
    state = merge(name, named([state_of(clip, name, *tasks) for tasks in (first, second, third)]))
    merged.load_state(state)
    assert_same(state, LearnerState({**merged.state().tensors, **names_of(state)}, merged.state().values))
    if name == "gapstream":
        whole._fusion = merged._fusion
    elif name == "ranpac":
        whole._ridge = merged._ridge

    # then they answer the same, also after what both learn next
    later = tiny_task(clip, 9, ["green", "orange"], seed=5)
    for task in (second[0], later):
        tokens = task.tokens.batch(torch.arange(len(task)))
        order = [whole.classes.index(name) for name in merged.classes]
        with torch.no_grad():
            got, want = (method.inference_module().from_tokens(tokens)[2] for method in (merged, whole))
        torch.testing.assert_close(got, want[:, order], rtol=1e-2, atol=1e-3)
        taught(merged, later)
        taught(whole, later)


def names_of(state: LearnerState) -> dict[str, Tensor]:
    """Those that a merged state leaves to its method to encode."""
    return {key: tensor for key, tensor in state.tensors.items() if key == "names"}


def test_neither_order_nor_grouping_changes_the_merged_learner(clip, name):
    a, b, c = (state_of(clip, name, *tasks) for tasks in streams(clip))
    whole = merge(name, named([a, b, c]))
    for order in itertools.permutations([a, b, c]):
        assert_same(whole, merge(name, named(order)))
        one, *others = order
        assert_same(whole, merge(name, named([one, merge(name, named(others))])))


def test_a_class_that_only_one_learner_has_keeps_its_mean_and_adds_nothing_to_the_scatter(clip):
    a, b = (state_of(clip, "gapstream", tiny_task(clip, 1, names)) for names in (["red", "green"], ["blue"]))
    merged = merge("gapstream", named([b, a]))
    assert merged.values["classes"] == ["blue", "green", "red"]
    assert torch.equal(merged.tensors["means"], torch.cat([b.tensors["means"], a.tensors["means"].flip(0)]))
    torch.testing.assert_close(merged.tensors["scatter"], a.tensors["scatter"] + b.tensors["scatter"])


def test_names_that_differ_only_in_case_are_one_class_as_they_are_in_a_stream(clip, name):
    a, b = (state_of(clip, name, tiny_task(clip, 1, names)) for names in (["red", "Green"], ["green", "blue"]))
    for states in ([a, b], [b, a]):
        assert merge(name, named(states)).values["classes"] == ["Green", "blue", "red"]
    if name != "ranpac":
        assert images(merge(name, named([a, b]))) == {"Green": 24, "blue": 12, "red": 12}


def test_the_fusion_is_the_geometric_mean_weighted_by_images(clip):
    states = []
    for per_class, temperature, weight in ((4, 0.01, 1.0), (12, 0.1, 16.0)):
        method = taught(built(clip), tiny_task(clip, 1, ["red", "green"], per_class))
        tensors = {**method.state().tensors, "fusion": torch.tensor([temperature, weight], dtype=torch.float64)}
        states.append(LearnerState(tensors, method.state().values))
    merged = merge("gapstream", named(states)).tensors["fusion"].tolist()
    assert merged == pytest.approx([0.01**0.25 * 0.1**0.75, 16**0.75])


def test_the_ridge_is_the_largest(clip):
    states = [state_of(clip, "ranpac", tiny_task(clip, 1, ["red", "green"])) for _ in range(2)]
    states[1].tensors["ridge"].fill_(1e6)
    assert merge("ranpac", named(states)).tensors["ridge"] == 1e6


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tasks adapt, and far enough to see."""
    monkeypatch.setattr("agent.methods.gapstream.LEAST_HELD", 4)
    monkeypatch.setattr("agent.methods.gapstream.LEARNING_RATE", 2e-2)
    monkeypatch.setattr("agent.methods.gapstream.stay", lambda gain, error: True)


def test_adapters_that_all_learners_have_are_kept_and_names_are_read_by_them(clip, eager):
    # given a learner whose towers have adapted, and another that went on from its adapters
    first = taught(built(clip, drift_budget=1e9), tiny_task(clip, 1, ["red", "green", "blue"], per_class=40))
    other = dict(first.state().tensors) | dict(
        state_of(clip, "gapstream", tiny_task(clip, 1, ["black", "red"])).tensors
    )
    states = [first.state(), LearnerState(other, {**first.state().values, "classes": ["black", "red"]})]
    assert all(adapted(state) for state in states)

    # when
    method = built(clip, drift_budget=1e9)
    method.load_state(merge("gapstream", named(states)))

    # then
    assert adapted(method.state()) and method.classes == ("black", "blue", "green", "red")
    assert torch.equal(method.encode_names(["black"]), first.encode_names(["black"]))
    torch.testing.assert_close(method.state().tensors["names"], first.encode_names(method.classes))


@pytest.mark.parametrize("others", [True, False])
def test_where_adapters_differ_the_merged_towers_are_the_untouched_ones(clip, eager, others):
    # given a learner whose towers have adapted, and one that has other adapters, or none
    task = tiny_task(clip, 1, ["red", "green", "blue"], per_class=40)
    moved = taught(built(clip, drift_budget=1e9), task).state()
    other = state_of(clip, "gapstream", tiny_task(clip, 1, ["black", "white"], seed=1))
    if others:
        own = {key: 2 * tensor for key, tensor in moved.tensors.items() if key.startswith(("image.", "text."))}
        other = LearnerState({**other.tensors, **own}, other.values)
    assert adapted(moved) and adapted(other) == others

    # when
    method = built(clip, drift_budget=1e9)
    method.load_state(merge("gapstream", named([moved, other])))

    # then nothing of the adapters is left, and the statistics are exact all the same
    assert not adapted(method.state()) and method.inference_module().adapted is None
    torch.testing.assert_close(method.state().tensors["names"], clip.encode_names(method.classes))
    scatter = moved.tensors["scatter"] + other.tensors["scatter"]
    torch.testing.assert_close(method.state().tensors["scatter"], scatter)
    # and it may adapt anew
    method.update(tiny_task(clip, 2, ["pink", "red"], per_class=40, seed=2), silent)


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "another seed": ({"seed": 1}, r"site 0 and site 1 .* began with another method\.seed"),
    "other features": (
        {"features": 48},
        r"site 0 and site 1 .* (40|24 \+ 16) random features and (48|29 \+ 19) cannot be added",
    ),
}


@pytest.mark.parametrize("other", REFUSED)
@pytest.mark.parametrize("name", ["gapstream", "ranpac"])
def test_random_features_that_differ_are_refused(clip, name, other):
    settings, message = REFUSED[other]
    task = tiny_task(clip, 1, ["red", "green"])
    states = [taught(built(clip, name, **chosen), task).state() for chosen in ({}, settings)]
    with pytest.raises(MergeError, match=message):
        merge(name, named(states))


def test_other_shares_of_as_many_random_features_are_refused_with_both_named(clip, monkeypatch):
    task = tiny_task(clip, 1, ["red", "green"])
    one = state_of(clip, "gapstream", task)
    monkeypatch.setattr("agent.methods.discriminant.TOKENS_SHARE", 0.75)
    with pytest.raises(MergeError, match=r"24 \+ 16 random features and 30 \+ 10 cannot be added"):
        merge("gapstream", named([one, state_of(clip, "gapstream", task)]))


def test_random_features_that_another_processor_rounds_otherwise_are_the_same(clip):
    a, b = (state_of(clip, "gapstream", tiny_task(clip, 1, ["red", "green"], seed=seed)) for seed in (0, 1))
    b.tensors["random.tokens"][0, 0] += ALIKE / 10
    merge("gapstream", named([a, b]))


def test_features_of_another_depth_are_refused(clip):
    a, b = (state_of(clip, "gapstream", tiny_task(clip, 1, ["red", "green"], seed=seed)) for seed in (0, 1))
    old = LearnerState(b.tensors, {key: value for key, value in b.values.items() if key != "depth"})
    with pytest.raises(MergeError, match=r"site 0 and site 1 .* before block 1 and before block 0"):
        merge("gapstream", named([a, old]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("seca", "a pool of the adapters"), ("bofa", "moved its projection"), ("zeroshot", "nothing but names")],
)
def test_methods_that_keep_what_does_not_add_up_are_refused_with_the_reason(name, reason):
    with pytest.raises(
        MergeError, match=rf"learners of {name} cannot be merged, since .*{reason}.*; .* gapstream, ncm"
    ):
        merge(name, named([LearnerState({}, {"classes": []})] * 2))


def test_every_method_is_merged_or_refused_with_a_reason():
    assert {*MERGED, "seca", "bofa", "zeroshot"} == methods.METHODS.keys()
    assert {*ADDITIVE, *AVERAGED} == {*MERGED}


def test_learners_are_left_as_they_were(clip, name):
    states = [state_of(clip, name, *tasks) for tasks in streams(clip)]
    before = [{key: tensor.clone() for key, tensor in state.tensors.items()} for state in states]
    merged = merge(name, named(states))
    for tensor in merged.tensors.values():
        tensor.zero_()
    for state, tensors in zip(states, before, strict=True):
        assert all(torch.equal(state.tensors[key], tensor) for key, tensor in tensors.items())
