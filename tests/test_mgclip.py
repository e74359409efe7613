"""MG-CLIP: local losses, the gap rules, compensation, both fusions, and the traps of continual CLIP training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from agent import config
from agent.config import Method
from agent.methods.base import TaskData, task_generator
from agent.methods.mgclip import MgClip
from agent.methods.training import GAP_SAMPLES, GapWatch
from tests.tiny import silent, tiny_clip, tiny_task


def method(clip, seed=0, **settings) -> MgClip:
    defaults = {"lr": 5e-3, "batch_size": 16, "visual_batch_size": 16, "drift_budget": 1e9}
    return MgClip(clip, Method.model_validate({"seed": seed, "mgclip": {**defaults, **settings}}))


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def adapters(learner: MgClip) -> dict[str, torch.Tensor]:
    return {k: v for k, v in learner.state().tensors.items() if k != "rows"}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def accuracy(learner, task) -> float:
    module = learner.inference_module()
    index = torch.tensor([module.classes.index(name) for name in task.classes])
    predicted = module.from_tokens(task.tokens.batch(torch.arange(len(task))))[2].argmax(1)
    return (predicted == index[task.labels]).float().mean().item()


def test_it_learns_a_task_and_still_knows_it_after_the_next(clip):
    learner = method(clip, epochs=3, visual_epochs=5)
    first, second = tiny_task(clip, 1, ["red", "green"]), tiny_task(clip, 2, ["blue", "black"])
    learner.update(first, silent)
    learner.update(second, silent)
    assert learner.classes == ("red", "green", "blue", "black")
    assert accuracy(learner, tiny_task(clip, 3, ["red", "green"], seed=0)) > 0.9
    assert accuracy(learner, second) > 0.9


def test_the_text_loss_is_over_the_tasks_own_names_even_when_the_first_task_was_larger(clip):
    """The published port subtracts a wrong class offset when the first task's size differs from the later ones'."""
    # given a first task of five classes and a second of two
    learner = method(clip)
    learner.update(tiny_task(clip, 1, ["a", "b", "c", "d", "e"]), silent)
    encoded: list[int] = []
    encode = learner._student.encode_ids

    def watch(ids):
        if torch.is_grad_enabled():
            encoded.append(len(ids))
        return encode(ids)

    learner._student.encode_ids = watch
    rows = learner.state().tensors["rows"]
    # when the second is learned
    learner.update(tiny_task(clip, 2, ["x", "y"]), silent)
    # then every step encoded its two names only, and no row of the first five moved
    assert set(encoded) == {2}
    assert torch.equal(learner.state().tensors["rows"][:5], rows)


def test_one_epoch_without_visual_training_is_the_published_loop(clip):
    """Agreement with the loop as the paper's code has it: all seen names encoded, logits sliced, raw towers."""
    learner = method(clip, visual_epochs=0, lr=1e-3)
    tasks = [tiny_task(clip, 1, ["a", "b", "c"]), tiny_task(clip, 2, ["d", "e"])]
    twin = copy.deepcopy(learner._student)
    seen: list[str] = []
    for task in tasks:
        learner.update(task, silent)
        order = task_generator(0, task.number, "order")
        seen += task.classes
        offset = len(seen) - len(task.classes)
        optimizer = torch.optim.Adam(list(twin.parameters()), lr=1e-3)
        for index in torch.randperm(len(task), generator=order).split(16):
            images = twin.encode_tokens(task.tokens.batch(index))
            logits = clip.logit_scale * images @ twin.encode_ids(clip.tokenize(seen)).T
            loss = F.cross_entropy(logits[:, offset:], task.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, tensor in twin.tensors().items():
        assert torch.allclose(adapters(learner)[name], tensor, atol=1e-5), name


def test_crossing_the_drift_budget_restores_the_last_state_inside_it(clip):
    # given a budget no training stays inside
    learner = method(clip, epochs=3, drift_budget=1e-6)
    before = adapters(learner)
    # when a task is learned
    update = learner.update(tiny_task(clip, 1, ["red", "green", "blue"]), silent)
    # then the adapters are the untouched ones, and the classes are learned all the same by their rows
    assert update.rolled_back and update.epochs == 0 and update.epochs_run == 1
    assert update.drift_after == update.drift_before
    assert same(adapters(learner), before)
    assert learner.classes == ("red", "green", "blue")


def test_the_budget_is_watched_in_every_task_not_only_the_first(clip):
    task, later = tiny_task(clip, 1, ["red", "green"], 2), tiny_task(clip, 2, ["blue", "black"], 64)
    drift = method(clip).update(task, silent).drift_after
    free = method(clip)
    free.update(task, silent)
    reached = free.update(later, silent).drift_after
    assert reached > drift, "the example must drift further in the second task"
    # given a budget between the two
    learner = method(clip, drift_budget=(drift + reached) / 2)
    assert not learner.update(task, silent).rolled_back
    kept = adapters(learner)
    assert learner.update(later, silent).rolled_back
    assert same(adapters(learner), kept)


def test_where_the_budget_is_used_up_an_update_that_drifts_no_further_is_kept(clip):
    # given a model that is beyond the budget, as after lowering it
    learner = method(clip)
    learner.update(tiny_task(clip, 1, ["red", "green"], 64), silent)
    beyond = method(clip, drift_budget=1e-6, lr=1e-12)
    beyond.load_state(learner.state())
    # when an update hardly moves it
    update = beyond.update(tiny_task(clip, 2, ["red", "green"], 8), silent)
    # then it is rolled back only for drifting further
    assert update.drift_before > 1e-6
    assert update.rolled_back == (update.details["drifts"][0] > update.drift_before)


def test_by_the_papers_schedule_a_dry_run_finds_the_epochs_and_the_first_task_is_trained_from_the_start(clip):
    first, second = tiny_task(clip, 1, ["red", "green", "blue"]), tiny_task(clip, 2, ["black", "white"])
    drifts = method(clip, epochs=4, lr=1e-4).update(first, silent).details["drifts"]
    assert drifts == sorted(drifts), "the example must drift further with every epoch"
    # given a threshold that the third of at most four epochs crosses
    learner = method(clip, schedule="paper", epochs=4, lr=1e-4, drift_budget=(drifts[1] + drifts[2]) / 2)
    update = learner.update(first, silent)
    # then the first task is what two epochs on a cosine over two make of it
    assert (update.epochs_run, update.epochs, update.rolled_back) == (2, 2, False)
    assert update.details["epochs_fixed"] == 2
    two = method(clip, epochs=2, lr=1e-4)
    two.update(first, silent)
    assert same(learner.state().tensors, two.state().tensors)
    # and every later one gets exactly so many, whatever it drifts
    later = learner.update(second, silent)
    assert (later.epochs_run, later.epochs, later.rolled_back) == (2, 2, False)


@pytest.mark.parametrize(("budget", "epochs"), [(1e-9, 1), (1e9, 3)])
def test_a_dry_run_that_violates_at_once_gives_one_epoch_and_one_that_never_does_all(clip, budget, epochs):
    learner = method(clip, schedule="paper", epochs=3, drift_budget=budget)
    update = learner.update(tiny_task(clip, 1, ["red", "green", "blue"]), silent)
    assert (update.epochs, update.rolled_back, update.details["epochs_fixed"]) == (epochs, False, epochs)


def test_the_first_task_of_two_classes_is_the_one_of_the_dry_run(clip):
    learner = method(clip, schedule="paper", epochs=2)
    assert learner.update(tiny_task(clip, 1, ["red"]), silent).details["epochs_fixed"] is None
    assert learner.update(tiny_task(clip, 2, ["green", "blue"]), silent).details["epochs_fixed"] == 2


def test_the_dry_run_measures_the_gap_on_all_images_of_the_task(clip, monkeypatch):
    measured: list[int] = []

    class Watch(GapWatch):
        def measure(self):
            measured.append(len(self._sample))
            return super().measure()

    monkeypatch.setattr("agent.methods.mgclip.GapWatch", Watch)
    task = tiny_task(clip, 1, ["red", "green"], GAP_SAMPLES // 2 + 1)
    method(clip, schedule="paper", epochs=1, batch_size=128, visual_epochs=0).update(task, silent)
    assert measured == [GAP_SAMPLES + 2] * 2 + [GAP_SAMPLES] * 2, "before and after an epoch, dry and not"


def test_the_preset_gives_the_published_form_and_keys_beside_it_win():
    paper = config.MgClip(preset="paper")
    assert (paper.schedule, paper.epochs, paper.fusion) == ("paper", 10, "faithful")
    assert (paper.drift_budget, paper.drift_relative_to) == (0.1, "negative")
    assert config.MgClip(preset="paper", epochs=3).epochs == 3
    assert config.MgClip(**paper.model_dump(mode="json")) == paper, "as a resolved configuration writes it"
    assert config.MgClip().schedule == "budget" and config.MgClip().fusion == "calibrated"


def test_a_loss_that_is_not_a_number_is_rolled_back(clip):
    learner = method(clip, lr=1e30, epochs=2, batch_size=4)
    update = learner.update(tiny_task(clip, 1, ["red", "green"]), silent)
    assert update.rolled_back
    assert all(torch.isfinite(t).all() for t in learner.state().tensors.values())


def test_rows_start_as_class_means_and_move_as_a_running_mean_when_a_class_returns(clip):
    learner = method(clip, epochs=1, drift_budget=1e-9, visual_epochs=0)  # adapters stay untouched
    first, again = tiny_task(clip, 1, ["red", "green"], 6), tiny_task(clip, 2, ["green", "blue"], 3, seed=5)
    learner.update(first, silent)
    learner.update(again, silent)
    features = [clip.encode_tokens(t.tokens.batch(torch.arange(len(t)))) for t in (first, again)]
    green = torch.cat([features[0][first.labels == 1], features[1][again.labels == 0]]).mean(0)
    assert learner.classes == ("red", "green", "blue")
    assert torch.allclose(learner.state().tensors["rows"][1], green, atol=1e-6)
    assert learner.state().values["counts"] == [6, 9, 3]


def test_a_single_class_and_a_single_sample_are_learned_by_their_row(clip):
    learner = method(clip)
    before = adapters(learner)
    update = learner.update(tiny_task(clip, 1, ["red"], 1), silent)
    assert update.gap_after.negative is None and update.drift_after is None and update.epochs == 0
    assert same(adapters(learner), before)
    learner.update(tiny_task(clip, 2, ["green"]), silent)
    assert accuracy(learner, tiny_task(clip, 3, ["green"])) > 0.9


def test_duplicates_in_a_task_are_no_trouble(clip):
    task = tiny_task(clip, 1, ["red", "green"], 4)
    twice = torch.cat([torch.arange(len(task))] * 2)
    doubled = TaskData(1, task.classes, task.labels[twice], type(task.tokens)(task.tokens.batch(twice)))
    learner = method(clip)
    learner.update(doubled, silent)
    assert accuracy(learner, task) == 1


def test_no_teacher_and_no_reference_aliases_the_student(clip):
    """What the gap is measured against must not move when the student trains."""
    tokens = tiny_task(clip, 1, ["red"]).tokens.batch(torch.arange(3))
    images, names = clip.encode_tokens(tokens), clip.encode_names(["red"])
    learner = method(clip)
    learner.update(tiny_task(clip, 1, ["red", "green"]), silent)
    module_before = learner.inference_module()
    answer = module_before.from_tokens(tokens)[2]
    learner.update(tiny_task(clip, 2, ["blue", "black"]), silent)
    assert torch.equal(clip.encode_tokens(tokens), images) and torch.equal(clip.encode_names(["red"]), names)
    assert not torch.equal(learner.encode_tokens(tokens), images)
    assert torch.equal(module_before.from_tokens(tokens)[2], answer)


def test_faithful_and_calibrated_fusion_differ_and_the_form_is_recorded(clip):
    task = tiny_task(clip, 1, ["red", "green", "blue"])
    tokens = task.tokens.batch(torch.arange(4))
    answers = {}
    for form in ("faithful", "calibrated"):
        learner = method(clip, fusion=form)
        assert learner.update(task, silent).details["fusion"] == form == learner.fusion
        embedding, logits, probabilities = learner.inference_module().from_tokens(tokens)
        assert torch.allclose(probabilities.sum(1), torch.ones(4), atol=1e-5)
        assert torch.allclose(logits.softmax(1), probabilities, atol=1e-5)
        answers[form] = probabilities
        # and the form is what its name says
        text = (clip.logit_scale * embedding @ learner.encode_names(task.classes).T).softmax(1)
        cosines = embedding @ F.normalize(learner.state().tensors["rows"], dim=-1).T
        if form == "faithful":
            expected = (text.softmax(1) + 4 * cosines.softmax(1)) / 5
        else:
            expected = (text + 2 * (clip.logit_scale * cosines).softmax(1)) / 3
        assert torch.allclose(probabilities, expected, atol=1e-5)
    assert not torch.allclose(answers["faithful"], answers["calibrated"], atol=1e-2)


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(clip):
    learner = method(clip)
    task = tiny_task(clip, 1, ["red", "green"])
    learner.update(task, silent)
    module = learner.inference_module()
    together = module.from_tokens(task.tokens.batch(torch.arange(len(task))))[2]
    alone = torch.cat([module.from_tokens(task.tokens.batch(torch.tensor([i])))[2] for i in range(len(task))])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(clip):
    task = tiny_task(clip, 1, ["red", "green", "blue"])
    states = []
    for seed in (0, 0, 1):
        learner = method(clip, seed)
        learner.update(task, silent)
        states.append(learner.state().tensors)
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_resuming_from_the_state_gives_the_undisturbed_model(clip):
    tasks = [tiny_task(clip, n, names) for n, names in enumerate((["a", "b"], ["c", "d"], ["b", "e"]), 1)]
    undisturbed = method(clip, schedule="paper", epochs=2)
    for task in tasks:
        undisturbed.update(task, silent)
    learner = method(clip, schedule="paper", epochs=2)
    for task in tasks:
        learner.update(task, silent)
        state = learner.state()
        learner = method(clip, schedule="paper", epochs=2)
        learner.load_state(state)
    assert same(learner.state().tensors, undisturbed.state().tensors)
    assert learner.state().values == undisturbed.state().values


def test_no_class_learned_means_nothing_to_infer_with(clip):
    with pytest.raises(LookupError, match="no class has been learned"):
        method(clip).inference_module()


def test_the_learning_rate_follows_the_papers_cosine(clip):
    rates = []
    learner = method(clip, epochs=4, lr=1e-3)
    adam = torch.optim.Adam.step

    def watch(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return adam(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watch)
        learner.update(tiny_task(clip, 1, ["red", "green"], 8), silent)
    reference = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=4, eta_min=1e-5)
    expected = []
    for _ in range(4):
        expected.append(schedule.get_last_lr()[0])
        reference.step()
        schedule.step()
    assert rates[:4] == pytest.approx(expected)
