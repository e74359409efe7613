"""Learners that train are merged by averages, weighted by images: whatever their order, and only where it means
something."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from agent import config, methods
from agent.methods.base import LearnerState, Method
from agent.methods.merging import AVERAGED, MergeError, adapted, images, merge
from agent.model.clip import Clip
from tests.test_merging import named, streams, taught
from tests.tiny import tiny_clip, tiny_task


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture(params=AVERAGED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def built(clip: Clip, name: str, seed: int = 0, lora: dict[str, Any] | None = None, **section: Any) -> Method:
    small = {"vrlwf": {"sentences": 4, "words": 3}}.get(name, {})
    chosen: dict[str, Any] = {name: {**small, **section}, **({"lora": lora} if lora else {})}
    return methods.build(clip, config.Method.model_validate({"name": name, "seed": seed, **chosen}))


@pytest.fixture(scope="module")
def states(clip: Clip) -> dict[str, list[LearnerState]]:
    """What learners of three streams keep, by method."""
    return {name: [taught(built(clip, name), *tasks).state() for tasks in streams(clip)] for name in AVERAGED}


def older(state: LearnerState) -> LearnerState:
    """A copy as an earlier version wrote it."""
    new = ("fusion",) if "epochs_fixed" in state.values else ("counts", "preset")
    return LearnerState(state.tensors, {key: value for key, value in state.values.items() if key not in new})


def assert_same(one: LearnerState, other: LearnerState) -> None:
    assert one.values == other.values and one.tensors.keys() == other.tensors.keys()
    for key, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[key], tensor, rtol=1e-6, atol=1e-7, msg=key)


def test_every_trained_tensor_is_the_mean_weighted_by_images_and_counts_add_up(states, name):
    merged = merge(name, named(states[name]))
    counts = [sum(images(state).values()) for state in states[name]]
    assert counts == [12 * 2 + 5 * 2, 7 * 3, 3 + 1]
    trained = [key for key in states[name][0].tensors if key != "rows"]
    assert any(".up." in key for key in trained) and adapted(merged)
    for key in trained:
        mean = sum(count * state.tensors[key] for count, state in zip(counts, states[name], strict=True)) / sum(counts)
        torch.testing.assert_close(merged.tensors[key], mean, rtol=1e-5, atol=1e-6)
        assert merged.tensors[key].dtype == states[name][0].tensors[key].dtype
    assert images(merged) == {"black": 7, "blue": 5, "green": 19, "pink": 3, "red": 18, "white": 7}


def test_a_class_that_only_one_has_keeps_its_row_and_others_have_the_mean_weighted_by_its_images(states):
    merged = merge("mgclip", named(states["mgclip"]))

    def row(state: LearnerState, name: str) -> torch.Tensor:
        return state.tensors["rows"][state.values["classes"].index(name)]

    first, second, third = states["mgclip"]
    for state, name in ((first, "blue"), (second, "black"), (second, "white"), (third, "pink")):
        assert torch.equal(row(merged, name), row(state, name))
    torch.testing.assert_close(row(merged, "green"), (12 * row(first, "green") + 7 * row(second, "green")) / 19)
    torch.testing.assert_close(row(merged, "red"), (17 * row(first, "red") + row(third, "red")) / 18)


def test_neither_order_nor_grouping_changes_the_average(states, name):
    whole = merge(name, named(states[name]))
    for order in itertools.permutations(states[name]):
        assert_same(whole, merge(name, named(order)))
        one, *others = order
        assert_same(whole, merge(name, named([one, merge(name, named(others))])))


def test_where_the_first_factors_are_the_same_the_change_of_the_towers_is_the_mean_of_the_changes(clip):
    # given two learners whose first factors did not move
    learners = [built(clip, "finetune") for _ in range(2)]
    begun = learners[0].state().tensors
    moved = []
    for number, count in enumerate((10, 30)):
        generator = torch.Generator().manual_seed(number)
        up = {key: torch.randn(begun[key].shape, generator=generator) for key in begun if ".up." in key}
        moved.append(LearnerState({**begun, **up}, {"classes": ["red"], "counts": [count]}))

    # when
    merged = merge("finetune", named(moved))

    # then
    untouched = {name: learners[0]._clip.image.get_parameter(name) for name in learners[0]._student.image.weights()}
    changes = []
    for state in (*moved, merged):
        learners[0].load_state(state)
        weights = learners[0]._student.image.weights()
        changes.append({name: (weights[name] - untouched[name]).detach() for name in weights})
    one, other, mean = changes
    for name in mean:
        torch.testing.assert_close(mean[name], 0.25 * one[name] + 0.75 * other[name], rtol=1e-4, atol=1e-5)


def test_the_merged_learner_answers_and_goes_on(clip, states, name):
    method = built(clip, name)
    merged = merge(name, named(states[name]))
    method.load_state(merged)
    assert_same(merged, method.state())
    task = tiny_task(clip, 9, ["green", "orange"], seed=5)
    with torch.no_grad():
        probabilities = method.inference_module().from_tokens(task.tokens.batch(torch.arange(len(task))))[2]
    assert probabilities.shape == (24, 6) and torch.isfinite(probabilities).all()
    taught(method, task)
    assert method.classes == (*merged.values["classes"], "orange")
    assert images(method.state())["green"] == 19 + 12 and images(method.state())["orange"] == 12


def test_towers_that_are_trained_whole_are_averaged_and_so_is_the_scale(clip):
    tasks = [tiny_task(clip, 1, ["red", "green"], seed=seed, per_class=4 + 8 * seed) for seed in range(2)]
    states = [taught(built(clip, "finetune", trainable="all", lr=1e-4), task).state() for task in tasks]
    merged = merge("finetune", named(states))
    key = "text.values.0"
    torch.testing.assert_close(merged.tensors[key], 0.25 * states[0].tensors[key] + 0.75 * states[1].tensors[key])
    assert adapted(merged)
    scaled = [
        LearnerState({"log_scale": torch.tensor(value)}, {"classes": ["red"], "counts": [5]}) for value in (1.0, 2.0)
    ]
    assert merge("vrlwf", named(scaled)).tensors["log_scale"] == 1.5


def test_the_epochs_of_the_papers_schedule_are_the_fewest_that_a_dry_run_allowed(states):
    def epochs(*found: int | None) -> int | None:
        learners = [
            LearnerState(state.tensors, {**state.values, "epochs_fixed": one})
            for state, one in zip(states["mgclip"], found, strict=False)
        ]
        return merge("mgclip", named(learners)).values["epochs_fixed"]

    assert (epochs(3, None, 2), epochs(None, None), epochs(4, 7)) == (2, None, 4)


def test_a_state_of_an_earlier_version_is_continued_but_has_no_weight_and_is_refused(clip, states):
    # given a learner that did not count its images
    for name in ("finetune", "vrlwf"):
        old = older(states[name][0])
        method = built(clip, name)
        method.load_state(old)
        for key, tensor in method.state().tensors.items():
            assert torch.equal(tensor, old.tensors[key])

        # when it goes on, it counts what comes new
        taught(method, tiny_task(clip, 3, ["red", "orange"]))
        assert images(method.state()) == {"red": None, "green": None, "blue": None, "orange": 12}

        # then nothing says what it weighs
        with pytest.raises(MergeError, match=r"site 1 cannot be merged: .* how many images of red .* earlier version"):
            merge(name, named([states[name][1], method.state()]))
    # and one that counted them, but did not say how it answers, is merged
    merged = merge("mgclip", named([older(states["mgclip"][0]), states["mgclip"][1]]))
    assert merged.values["fusion"] == "calibrated"


TASK = (1, ["red", "green"])


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("mgclip", {"seed": 1}, r"a cosine of -?0\.\d\d, so they began with another method\.seed"),
        ("finetune", {"seed": 1}, r"site 0 and site 1 .* another method\.seed"),
        ("finetune", {"lora": {"rank": 4}}, r"image\.down\.0 is \[2, 8, 64\] in the one, \[2, 4, 64\] in the other"),
        ("finetune", {"trainable": "all"}, r"image\.down\.0 is \[2, 8, 64\] in the one, missing in the other"),
        ("mgclip", {"fusion": "faithful"}, r"site 0 and site 1 .* fusion 'calibrated' .* the other with 'faithful'"),
        ("vrlwf", {"preset": "zscl"}, r"site 0 and site 1 .* preset 'ours' .* the other with 'zscl'"),
    ],
)
def test_what_does_not_agree_is_refused_with_both_sides_named(clip, name, other, message):
    task = tiny_task(clip, *TASK)
    learners = [taught(built(clip, name, **chosen), task).state() for chosen in ({}, other)]
    with pytest.raises(MergeError, match=message):
        merge(name, named(learners))


def test_learners_are_left_as_they_were_and_share_nothing_with_the_average(states, name):
    before = [{key: tensor.clone() for key, tensor in state.tensors.items()} for state in states[name]]
    for tensor in merge(name, named(states[name])).tensors.values():
        tensor.zero_()
    for state, tensors in zip(states[name], before, strict=True):
        assert all(torch.equal(state.tensors[key], tensor) for key, tensor in tensors.items())


def test_a_learner_that_trained_nothing_weighs_as_many_images_as_it_has(clip, states):
    """One class alone has nothing to be told apart from: its adapters stay, and dilute those of others."""
    single = taught(built(clip, "finetune"), tiny_task(clip, 1, ["pink"], per_class=34)).state()
    first = states["finetune"][0]
    merged = merge("finetune", named([first, single]))
    torch.testing.assert_close(merged.tensors["image.up.0"], first.tensors["image.up.0"] / 2)
