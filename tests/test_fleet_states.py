"""What leaves a site, and what sites answer with together: exact, and no image that may not leave is in it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agent.config.fleet import FLEET_METHODS
from agent.fleet_states import FACTS, SCHEMAS, SharedRefused, check, facts
from agent.methods.base import Counted, LearnerState, Method, TaskData
from agent.methods.gapstream import START
from agent.methods.merging import MergeError, merge
from agent.methods.publishing import SiteLearner, incoming, together
from agent.methods.training import unpack
from agent.model.clip import Clip
from tests.test_merging import built, taught
from tests.tiny import PlainTokens, tiny_clip, tiny_task

IDENTITY = {"name": "tiny", "sha256": "0" * 64, "prompt": "a {}.", "pretrained": "none"}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture(params=FLEET_METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def joined(number: int, *tasks: TaskData) -> TaskData:
    """One task of the images of several."""
    classes = tuple(dict.fromkeys(name for task in tasks for name in task.classes))
    labels = torch.cat([torch.tensor([classes.index(task.classes[i]) for i in task.labels]) for task in tasks])
    return TaskData(number, classes, labels, PlainTokens(torch.cat([task.tokens.tensor for task in tasks])))


def part(task: TaskData, number: int, index: Tensor) -> TaskData:
    present = [name for i, name in enumerate(task.classes) if (task.labels[index] == i).any()]
    labels = torch.tensor([present.index(task.classes[i]) for i in task.labels[index]])
    return TaskData(number, tuple(present), labels, PlainTokens(task.tokens.tensor[index]))


class Sender:
    """A site that learns, and holds back what is too little."""

    def __init__(self, clip: Clip, name: str, least: int) -> None:
        self.learner = SiteLearner(built(clip, name), least)

    @property
    def method(self) -> Method:
        return self.learner.method

    def learn(self, task: TaskData) -> None:
        taught(self.method, task)
        self.learner.learned(task)

    def sends(self) -> tuple[dict[str, Tensor], list[str]]:
        return self.learner.sends()


def assert_sent(sent: tuple[dict[str, Tensor], list[str]], method: Method) -> None:
    """What is sent is what `method` has counted, within rounding."""
    tensors, classes = sent
    state = method.state()
    counts = torch.as_tensor(state.values.get("counts", state.tensors.get("counts")))
    rows = [state.values["classes"].index(name) for name in classes]
    assert torch.equal(tensors["counts"], counts[rows].float()) and len(rows) == len(counts)
    torch.testing.assert_close(tensors["means"], state.tensors["means"][rows], rtol=1e-4, atol=1e-5)
    if "scatter" in tensors:
        torch.testing.assert_close(tensors["embeddings"], state.tensors["embeddings"][rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensors["scatter"], state.tensors["scatter"], rtol=1e-4, atol=1e-4)


def test_of_classes_with_too_few_images_nothing_leaves_neither_mean_nor_share_of_the_scatter(clip, name):
    # given a stream in which some classes have three images and one, and a learner that never saw these
    many, few, one = (
        tiny_task(clip, 1, classes, per_class=count, seed=seed)
        for classes, count, seed in ((["red", "green"], 9, 0), (["rare", "odd"], 3, 1), (["single"], 1, 2))
    )
    site = Sender(clip, name, least=5)
    site.learn(joined(1, many, few, one))
    assert site.sends()[1] == ["red", "green"]
    assert_sent(site.sends(), taught(built(clip, name), many))
    # when more of a class come, they leave with those that waited
    more = tiny_task(clip, 2, ["odd"], per_class=2, seed=3)
    site.learn(more)
    expected = taught(built(clip, name), joined(1, many, part(few, 1, (few.labels == 1).nonzero().squeeze(1)), more))
    assert site.sends()[1] == ["red", "green", "odd"]
    assert_sent(site.sends(), expected)


def test_what_leaves_never_grows_by_few_images_of_a_class(clip, name):
    # given a known class of which one image at a time comes: the difference of two states would be that image
    site, least = Sender(clip, name, least=4), 4
    first = tiny_task(clip, 1, ["red", "green"], per_class=6)
    site.learn(first)
    seen = [first]
    sent = [site.sends()]
    for number in range(2, 12):
        task = tiny_task(clip, number, ["red"], per_class=1, seed=number)
        site.learn(task)
        seen.append(task)
        sent.append(site.sends())
    reds = [tensors["counts"][classes.index("red")].item() for tensors, classes in sent]
    assert reds == [6, 6, 6, 6, 10, 10, 10, 10, 14, 14, 14]
    for (before, _), (now, _), old, new in zip(sent, sent[1:], reds, reds[1:], strict=False):
        if old == new:  # within rounding nothing has changed
            for key, tensor in before.items():
                if key != "fusion":
                    torch.testing.assert_close(now[key], tensor, rtol=1e-4, atol=1e-4, msg=key)
    # and what has left is exactly what a learner has that saw the images up to there
    assert_sent(sent[4], taught(built(clip, name), joined(1, *seen[:5])))
    assert least - 1 >= len(site.learner.held.classes) == 2


def test_without_a_least_number_everything_leaves(clip, name):
    site = Sender(clip, name, least=1)
    site.learn(tiny_task(clip, 1, ["red", "green"], per_class=1))
    assert site.learner.held.classes == ()
    assert_sent(site.sends(), site.method)


def test_a_class_learned_before_the_fleet_with_too_few_images_stays_behind(clip, name):
    site = Sender(clip, name, least=5)
    taught(site.method, tiny_task(clip, 1, ["red"], per_class=3))
    site.learn(tiny_task(clip, 2, ["green"], per_class=5))
    assert site.sends()[1] == ["green"]
    site.learn(tiny_task(clip, 3, ["red"], per_class=3, seed=1))  # three that are known now, and may be subtracted
    assert site.sends()[1] == ["green"]
    site.learn(tiny_task(clip, 4, ["red"], per_class=2, seed=2))
    tensors, classes = site.sends()
    assert classes == ["red", "green"] and tensors["counts"].tolist() == [8, 5]


def written(folder: Path, site: Sender) -> Path:
    tensors, classes = site.sends()
    said = facts(site.method.name, IDENTITY, 3, ["root"], site.learner.own().values, classes)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "shared", said)
    return folder / "shared"


def received(own: Method, path: Path) -> LearnerState:
    shared = check(path)
    return incoming(own.state(), load_file(path), list(shared.classes), shared.depth, shared.fitted)


def test_sites_answer_together_as_one_learner_that_saw_everything(clip, name, tmp_path):
    # given three sites, two of which share classes, written in other cases
    tasks = [
        tiny_task(clip, 1, ["red", "green"]),
        joined(1, tiny_task(clip, 1, ["blue"], seed=1), replace(tiny_task(clip, 1, ["red"], seed=5), classes=("Red",))),
        tiny_task(clip, 1, ["white", "black"], per_class=7, seed=2),
    ]
    sites = [Sender(clip, name, least=1) for _ in tasks]
    for site, task in zip(sites, tasks, strict=True):
        site.learn(task)
    whole = taught(built(clip, name), joined(1, tasks[0], replace(tasks[1], classes=("blue", "red")), tasks[2]))
    expected = whole.inference_module()
    pictures = torch.cat([task.tokens.tensor for task in tasks])
    for here, own in enumerate(sites):
        others = {}
        for there, other in enumerate(sites):
            if there != here:
                (tmp_path / f"{here}{there}").mkdir()
                others[f"site {there}"] = received(own.method, written(tmp_path / f"{here}{there}", other))
        # when
        answers = built(clip, name)
        answers.load_state(together(name, own.learner.own(), others))
        module = answers.inference_module()
        # then each spells the class as it knows it, and answers alike
        assert ("Red" in answers.classes) == (here != 0) and len(answers.classes) == 5
        order = [[one.casefold() for one in expected.classes].index(one.casefold()) for one in answers.classes]
        if name == "gapstream":  # the fusion of sites is a mean, not the one that is fitted to all images
            answers._fusion = whole._fusion
            module = answers.inference_module()
        torch.testing.assert_close(
            module.from_tokens(pictures)[2], expected.from_tokens(pictures)[2][:, order], rtol=1e-2, atol=2e-3
        )
        # and its own learner is as it was
        assert own.method.classes == tasks[here].classes


def test_each_site_keeps_its_own_adapters_and_none_leave(clip, tmp_path):
    # given two sites whose towers adapted to other images
    sites = [Sender(clip, "gapstream", least=1) for _ in range(2)]
    for number, site in enumerate(sites):
        site.learner.method = built(clip, "gapstream", drift_budget=0.5)
        site.learn(tiny_task(clip, 1, ["red", "green"], seed=number))
        site.method._student.load_tensors(
            {key: torch.randn(value.shape) * 0.05 for key, value in site.method._student.tensors().items()}
        )
        site.method._adapted = True
    own, other = sites
    path = written(tmp_path, other)
    assert set(load_file(path)) == set(SCHEMAS["gapstream"])
    # when
    state = together("gapstream", own.learner.own(), {"b": received(own.method, path)})
    # then the towers are this site's, and the statistics those of both, whatever the adapters are
    mine = own.method.state().tensors
    adapters = [key for key in mine if key.startswith(("image.", "text."))]
    assert adapters and all(torch.equal(state.tensors[key], mine[key]) for key in adapters)
    both = merge("gapstream", {"a": own.method.state(), "b": other.method.state()})
    for key in ("counts", "means", "embeddings", "scatter"):
        torch.testing.assert_close(state.tensors[key], both.tensors[key], rtol=1e-5, atol=1e-5)
    answers = built(clip, "gapstream", drift_budget=0.5)
    answers.load_state(state)
    names = answers.encode_names(["red"])
    assert answers._adapted and torch.equal(names, own.method.encode_names(["red"]))


def test_a_site_that_has_learned_nothing_answers_with_the_others(clip, name, tmp_path):
    other = Sender(clip, name, least=1)
    other.learn(tiny_task(clip, 1, ["red", "green"]))
    own = Sender(clip, name, least=1)
    answers = own.learner.answers(lambda: built(clip, name), {"b": received(own.method, written(tmp_path, other))})
    assert answers.classes == ("green", "red")
    assert answers.inference_module().classes == ("green", "red")


def test_sites_that_do_not_add_up_are_refused(clip, tmp_path):
    other = Sender(clip, "gapstream", least=1)
    other.learn(tiny_task(clip, 1, ["red", "green"]))
    path = written(tmp_path, other)
    for own, message in (
        (built(clip, "gapstream", seed=1), r"only sites with one method\.seed"),
        (built(clip, "gapstream", features=41), "class means of 41 and 40 features"),
        (built(clip, "ncm"), "features cannot be added"),
    ):
        with pytest.raises(MergeError, match=message):
            received(own, path)


def test_the_same_facts_make_the_same_file_and_configuration_and_table_name_the_same_methods(clip, tmp_path):
    site = Sender(clip, "gapstream", least=1)
    site.learn(tiny_task(clip, 1, ["red", "green"]))
    first = written(tmp_path, site).read_bytes()
    assert written(tmp_path, site).read_bytes() == first
    assert tuple(SCHEMAS) == FLEET_METHODS


def test_every_state_that_cannot_have_been_counted_is_refused(clip, tmp_path):
    site = Sender(clip, "gapstream", least=1)
    site.learn(tiny_task(clip, 1, ["red", "green"]))
    path = written(tmp_path, site)
    good, said = load_file(path), json.loads(facts("gapstream", IDENTITY, 3, ["r"], {}, ["red", "green"])[FACTS])
    shared = check(path)
    assert (shared.classes, shared.images, shared.task, shared.features) == (("red", "green"), (12, 12), 3, 40)

    def spoiled(key: str, at: object, value: float) -> dict[str, Tensor]:
        tensor = good[key].clone()
        tensor[at] = value
        return good | {key: tensor}

    bad: list[tuple[object, object]] = [
        (spoiled("means", (0, 0), float("nan")), said), (spoiled("embeddings", (0, 0), float("nan")), said),
        (spoiled("scatter", 5, float("inf")), said),
        (spoiled("counts", 0, -1), said), (spoiled("counts", 0, 0), said), (spoiled("counts", 0, 1.5), said),
        (spoiled("counts", 0, float("inf")), said), (spoiled("counts", 0, 1e38), said), (spoiled("fusion", 0, 0), said),
        (spoiled("fusion", 1, -1), said), (spoiled("fusion", 1, 1e300), said), (spoiled("fusion", 0, 1e-300), said),
        (spoiled("fusion", 0, float("nan")), said), (spoiled("counts", 0, float("nan")), said),
        (good | {"means": good["means"][:1]}, said), (good | {"means": good["means"][:, :-1].contiguous()}, said),
        (good | {"scatter": good["scatter"][:-1]}, said), (good | {"counts": good["counts"].double()}, said),
        (good | {"more": good["counts"]}, said), ({k: v for k, v in good.items() if k != "counts"}, said),
        (good | {"fusion": good["fusion"][:1]}, said), (good | {"counts": good["counts"][:0]}, said),
        *((good, said | change) for change in (
            {"format": 1}, {"format": 3}, {"method": "mgclip"}, {"method": []}, {"classes": ["red"]},
            {"classes": ["red", "Red"]},
            {"classes": ["red", "a\x00"]}, {"classes": ["red", "a\nb"]}, {"classes": ["red", "\x1b[2J"]},
            {"classes": ["red", "\ud800"]}, {"classes": ["red", " a"]},
            {"classes": ["red", ""]}, {"classes": ["red", "x" * 2000]}, {"classes": "ab"}, {"classes": ["red", 3]},
            {"task": -1}, {"task": "3"}, {"depth": 1.5}, {"roots": [1]}, {"roots": 3}, {"model": None}, {"model": {}},
            {"model": {"name": 1, "sha256": "", "prompt": ""}},
        )),
        (good, None), (good, [1]), (good, "text"),
    ]  # fmt: skip
    for tensors, words in bad:
        save_file(
            {key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "bad", {FACTS: json.dumps(words)}
        )
        with pytest.raises(SharedRefused):
            check(tmp_path / "bad")
    save_file(good, tmp_path / "bad", {FACTS: "{" * 100_000})
    with pytest.raises(SharedRefused):
        check(tmp_path / "bad")
    for data in (b"", b"{}", path.read_bytes()[:-7], b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}"):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(SharedRefused):
            check(tmp_path / "bad")
    with pytest.raises(SharedRefused):
        check(tmp_path / "nowhere")


def test_a_large_state_is_looked_at_block_by_block_and_a_number_at_its_end_found(tmp_path, monkeypatch):
    means = torch.zeros(3, 40)
    means[2, 39] = float("inf")
    for block in (1, 64, 80, 1000):
        monkeypatch.setattr("agent.fleet_states._BLOCK", block)
        for rows, message in ((2, None), (3, "its means has numbers that are not finite")):
            tensors = {"counts": torch.ones(rows), "means": means[:rows].clone()}
            save_file(tensors, tmp_path / "state", facts("ncm", IDENTITY, 1, ["root"], {}, ["a", "b", "c"][:rows]))
            if message is None:
                assert check(tmp_path / "state").images == (1, 1)
            else:
                with pytest.raises(SharedRefused, match=message):
                    check(tmp_path / "state")


def test_numbers_that_no_images_have_are_refused(clip, name):
    # given finite numbers, which in a sum with those of all others would not be finite any more
    own, other = Sender(clip, name, least=1), Sender(clip, name, least=1)
    other.learn(tiny_task(clip, 1, ["red", "green"]))
    tensors, classes = other.sends()
    for key in {"means", "embeddings", "scatter"} & tensors.keys():
        for factor, refused in ((1, False), (1e30, True)):
            sent = {**tensors, key: factor * tensors[key]}
            with pytest.raises(MergeError, match="that it sent has") if refused else contextlib.nullcontext():
                incoming(own.method.state(), sent, classes, own.method.state().values.get("depth", 0), True)


def test_what_an_earlier_version_published_is_added_with_embeddings_that_are_not_known(clip, tmp_path):
    # given a file of format 1, which had no class means of embeddings
    other, own = Sender(clip, "gapstream", least=1), Sender(clip, "gapstream", least=1)
    other.learn(tiny_task(clip, 1, ["red", "green"]))
    own.learn(tiny_task(clip, 1, ["blue", "black"], seed=1))
    path = written(tmp_path, other)
    tensors = {key: tensor for key, tensor in load_file(path).items() if key != "embeddings"}
    said = json.loads(facts("gapstream", IDENTITY, 3, ["root"], other.learner.own().values, ["red", "green"])[FACTS])
    save_file(tensors, path, {FACTS: json.dumps(said | {"format": 1})})
    # when
    answers = own.learner.answers(lambda: built(clip, "gapstream"), {"other": received(own.method, path)})
    # then
    known = answers.state().tensors["embeddings"].isfinite().all(1)
    assert dict(zip(answers.classes, known.tolist(), strict=True)) == {
        "black": True, "blue": True, "green": False, "red": False,
    }  # fmt: skip
    assert answers.inference_module().from_tokens(tiny_task(clip, 1, ["red"]).tokens.tensor)[2].isfinite().all()


def test_without_other_sites_the_weights_are_the_learners_own_again(clip, tmp_path):
    other, own = Sender(clip, "gapstream", least=1), Sender(clip, "gapstream", least=1)
    other.learn(tiny_task(clip, 1, ["red", "green"]))
    own.learn(tiny_task(clip, 1, ["blue", "black"], seed=1))
    own.learner.answers(lambda: built(clip, "gapstream"), {"other": received(own.method, written(tmp_path, other))})
    assert own.learner.fusion is not None
    assert own.learner.answers(lambda: built(clip, "gapstream"), {}) is own.method
    assert own.learner.own().tensors["fusion"].tolist() == list(astuple(own.method.weights))


def test_a_task_of_single_images_leaves_the_images_that_the_weights_are_fitted_to(clip):
    site = Sender(clip, "gapstream", least=1)
    site.learn(tiny_task(clip, 1, ["red", "green"]))
    before = site.learner.last
    site.learn(tiny_task(clip, 2, ["blue", "black"], per_class=1))
    assert before.classes and site.learner.last is before and site.learner.task == 1


def test_a_scatter_that_is_none_is_refused(clip, tmp_path):
    site = Sender(clip, "gapstream", least=1)
    site.learn(tiny_task(clip, 1, ["red", "green"]))
    path = written(tmp_path, site)
    tensors = load_file(path)
    scatter = torch.zeros(40, 40)
    unpack(tensors["scatter"], scatter)
    row = 7 * 8 // 2 + 7
    tensors["scatter"][row] = -tensors["scatter"][row] - 1
    with pytest.raises(MergeError, match="less than no variance"):
        incoming(site.method.state(), tensors, ["red", "green"], check(path).depth, True)


def test_other_shares_of_as_many_random_features_are_refused_with_both_named(clip, tmp_path, monkeypatch):
    site = Sender(clip, "gapstream", least=1)
    site.learn(tiny_task(clip, 1, ["red", "green"]))
    monkeypatch.setattr("agent.methods.discriminant.TOKENS_SHARE", 0.75)
    with pytest.raises(MergeError, match=r"random\.tokens of 30 and 24 features cannot be added"):
        received(built(clip, "gapstream"), written(tmp_path, site))


def test_where_all_classes_have_too_few_images_nothing_leaves(clip):
    site = Sender(clip, "gapstream", least=5)
    site.learn(tiny_task(clip, 1, ["red", "green"], per_class=2))
    assert isinstance(site.learner.held, Counted) and site.learner.held.classes == ("red", "red", "green", "green")
    assert site.sends()[1] == []


def test_the_fusion_is_fitted_among_the_classes_of_all_sites_and_all_answer_with_the_mean(clip, tmp_path):
    # given two sites of one class each, which have fitted nothing, as one class needs no weights
    tasks = {"a": tiny_task(clip, 1, ["red"]), "b": tiny_task(clip, 1, ["green"], per_class=6)}
    sites = {site: Sender(clip, "gapstream", least=1) for site in tasks}
    for site, task in tasks.items():
        sites[site].learn(task)

    def sent(site: str) -> LearnerState:
        path = tmp_path / f"{site} {len(list(tmp_path.iterdir()))}"
        path.mkdir()
        return received(sites["b" if site == "a" else "a"].method, written(path, sites[site]))

    def answers(site: str) -> tuple[float, ...]:
        others = {one: sent(one) for one in tasks if one != site}
        made = sites[site].learner.answers(lambda: built(clip, "gapstream"), others)
        return astuple(made._fusion)

    assert [sent(site).values["fitted"] for site in tasks] == [False, False]
    # when one takes up what the other learned, it fits them to the images of its last task
    first = answers("a")
    assert first != astuple(START) and tuple(sites["a"].learner.fusion.tolist()) == pytest.approx(first)
    # and when both have, they answer with the mean, weighted by images
    answers("b")
    mine, theirs = (sites[site].learner.fusion.log() for site in tasks)
    expected = ((12 * mine + 6 * theirs) / 18).exp().tolist()
    assert answers("a") == pytest.approx(expected) and answers("b") == pytest.approx(expected)
    # the same again changes nothing, so that nothing is published again
    before = {site: sites[site].learner.fusion for site in tasks}
    for site in tasks:
        answers(site)
        assert torch.equal(sites[site].learner.fusion, before[site])
    # while a site's own learner keeps its own
    assert sites["a"].method._fusion == START
