"""With `auto` the form of a release that is fastest on the machine answers, found out once in bounded time."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter import fastest as timing
from exporter.fastest import FORM_S, LARGER_BATCH, Chooser, Timing, fastest
from exporter.onnx import OnnxExporter
from exporter.precision import AUTO, MIN_GAIN, PRECISIONS
from exporter.release import Parity, Release, ReleaseError, Variant, read
from exporter.runtime import Classifier
from exporter.trace_cache import user_cache
from tests.fakes import write_release
from tests.test_onnx import FACTS, PREPROCESS, SIZE, Toy, native_tower
from tests.test_runtime import State, picture, png
from tests.test_serve import ask, serving, wait_for

IMAGES = np.zeros((3, 3, 8, 8), np.float32)
GOOD = Variant(Parity(0, 0, 0, 1, 1, 1, (1,), "CPUExecutionProvider"), 0.1, None, None, None)


FASTER: dict[str, float | Exception] = {"fp32": 0.01, "int8": 0.005}
"""Seconds of an image where int8 is twice as fast."""


class Clock:
    """The time by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


class Form:
    """A model that takes `lone` seconds for a lone image, and `each` seconds for every image of a larger batch."""

    def __init__(
        self, clock: Clock, lone: float, each: float | None = None, provider: str = "CPUExecutionProvider"
    ) -> None:
        self.provider = provider
        self.sizes: list[int] = []
        self._clock = clock
        self._lone = lone
        self._each = lone if each is None else each

    def run(self, images: np.ndarray) -> None:
        self.sizes.append(len(images))
        self._clock.now += self._lone if len(images) == 1 else self._each * len(images)


def test_the_fastest_form_is_chosen_and_its_images_a_second_are_told(clock):
    forms = {"fp32": Form(clock, 0.01, 0.008), "fp16": Form(clock, 0.006, 0.005), "int8": Form(clock, 0.005, 0.002)}

    found = fastest(forms, "fp32", IMAGES, max_batch=64)

    assert found.chosen == "int8"
    assert found.rates == {
        1: pytest.approx({"fp32": 100, "fp16": 1 / 0.006, "int8": 200}),
        LARGER_BATCH: pytest.approx({"fp32": 125, "fp16": 200, "int8": 500}),
    }
    assert str(found) == (
        "batch 1: fp32 100.0 (1.00x), fp16 166.7 (1.67x), int8 200.0 (2.00x); "
        "batch 16: fp32 125.0 (1.00x), fp16 200.0 (1.60x), int8 500.0 (4.00x)"
    )


@pytest.mark.parametrize(
    ("lone", "each", "chosen"),
    [
        (1 / MIN_GAIN - 0.01, 1 / MIN_GAIN - 0.01, "int8"),
        (1 / MIN_GAIN + 0.01, 1 / MIN_GAIN + 0.01, "fp32"),
        (0.3, 0.9, "fp32"),
        (0.9, 0.3, "fp32"),
        (2, 2, "fp32"),
    ],
)
def test_a_smaller_form_must_be_clearly_faster_at_every_batch_size(clock, lone, each, chosen):
    forms = {"fp32": Form(clock, 0.01), "int8": Form(clock, 0.01 * lone, 0.01 * each)}

    assert fastest(forms, "fp32", IMAGES, max_batch=64).chosen == chosen


def test_a_batch_is_no_larger_than_those_that_are_served(clock):
    for most, sizes in ((1, {1}), (4, {1, 4}), (64, {1, LARGER_BATCH})):
        form = Form(clock, 0.01)
        assert fastest({"fp32": form, "int8": Form(clock, 0.01)}, "fp32", IMAGES, most).rates.keys() == sizes
        assert set(form.sizes) == sizes


@pytest.mark.parametrize("seconds", [0.0001, 0.004, 0.05, 0.11, 0.4, 1.9])
def test_the_time_it_takes_is_bounded_whatever_the_model(clock, seconds):
    forms = {"fp32": Form(clock, seconds), "int8": Form(clock, seconds / 3)}

    assert fastest(forms, "fp32", IMAGES, max_batch=64).chosen == "int8"

    assert clock.now <= FORM_S * len(forms)


def test_of_a_model_that_takes_long_one_image_is_enough(clock):
    forms = {"fp32": Form(clock, 20), "int8": Form(clock, 8)}

    found = fastest(forms, "fp32", IMAGES, max_batch=64)

    assert found == Timing("int8", {1: {"fp32": 1 / 20, "int8": 1 / 8}}, {1: {"fp32": 1, "int8": 20 / 8}})
    assert clock.now == 28


def test_a_machine_that_is_busy_for_a_while_changes_no_choice(clock):
    class Busy(Form):
        def run(self, images: np.ndarray) -> None:
            before = clock.now
            super().run(images)
            clock.now += 9 * (clock.now - before) * (0.1 < before < 1)

    forms = {"fp32": Busy(clock, 0.010), "int8": Busy(clock, 0.009)}

    assert fastest(forms, "fp32", IMAGES, max_batch=1).chosen == "fp32"


def test_the_memory_that_a_first_batch_takes_does_not_count(clock):
    class Cold(Form):
        def run(self, images: np.ndarray) -> None:
            clock.now += 0.2 * (len(images) not in self.sizes)
            super().run(images)

    forms = {"fp32": Cold(clock, 0.01), "int8": Form(clock, 0.01)}

    assert fastest(forms, "fp32", IMAGES, max_batch=64).chosen == "fp32"


def released(folder: Path, forms: Sequence[str] = (), model: str = "a") -> Release:
    """A release that says it has these forms, with nothing in it but golden images."""
    write_release(folder, ["cat"], "model")
    np.savez(folder / "golden.npz", images=IMAGES)
    return replace(read(folder), variants=dict.fromkeys(forms, GOOD), facts={"model": model})


class Opener:
    """Opens forms that take the given seconds an image, or raise, and remembers which."""

    def __init__(
        self, clock: Clock, seconds: dict[str, float | Exception], provider: str = "CPUExecutionProvider"
    ) -> None:
        self.opened: list[str] = []
        self.forms: dict[str, Form] = {}
        self._new = {
            name: one if isinstance(one, Exception) else Form(clock, one, provider=provider)
            for name, one in seconds.items()
        }

    def __call__(self, name: str) -> Form:
        self.opened.append(name)
        form = self._new[name]
        if isinstance(form, Exception):
            raise form
        self.forms[name] = form
        return form

    @property
    def timed(self) -> set[str]:
        return {name for name, form in self.forms.items() if form.sizes}


def test_a_release_in_fp32_alone_is_opened_and_nothing_timed(clock, tmp_path):
    opener = Opener(clock, {"fp32": 1})

    assert Chooser(64).open(released(tmp_path / "r"), opener) == ("fp32", opener.forms["fp32"])

    assert opener.opened == ["fp32"] and not opener.timed


def test_a_choice_is_logged_and_kept_for_later_releases_with_the_same_structure(clock, tmp_path, caplog):
    caplog.set_level("INFO")
    chooser = Chooser(64)
    first, later, other = Opener(clock, FASTER), Opener(clock, FASTER), Opener(clock, FASTER)
    one = released(tmp_path / "1", ["int8"])

    assert chooser.open(one, first) == ("int8", first.forms["int8"])
    [said] = [record.getMessage() for record in caplog.records]
    assert said == (
        f"release {one.id} and later ones of its structure are served in int8; images a second with "
        "batch 1: fp32 100.0 (1.00x), int8 200.0 (2.00x); batch 16: fp32 100.0 (1.00x), int8 200.0 (2.00x); "
        "fp32 answers unless another form is 1.3 times as fast"
    )
    more = replace(released(tmp_path / "2", ["int8"]), classes=("cat", "dog"))
    assert chooser.open(more, later) == ("int8", later.forms["int8"])
    assert later.opened == ["int8"] and not later.timed and len(caplog.records) == 1
    assert chooser.open(released(tmp_path / "3", ["int8"], model="b"), other) == ("int8", other.forms["int8"])
    assert other.timed == {"fp32", "int8"}


def test_fp32_is_kept_as_a_choice_too(clock, tmp_path):
    chooser, release = Chooser(64), released(tmp_path / "r", ["int8"])
    later = Opener(clock, FASTER)

    assert chooser.open(release, Opener(clock, {"fp32": 0.01, "int8": 0.02}))[0] == "fp32"

    assert chooser.open(release, later)[0] == "fp32" and later.opened == ["fp32"]


def test_another_set_of_forms_is_timed_anew(clock, tmp_path):
    chooser = Chooser(64)
    chooser.open(released(tmp_path / "1", ["int8"]), Opener(clock, FASTER))
    both = Opener(clock, FASTER | {"fp16": 0.001})

    assert chooser.open(released(tmp_path / "2", ["fp16", "int8"]), both)[0] == "fp16"

    # The gate refused int8 for the next one, and the one after has it again.
    assert chooser.open(released(tmp_path / "3"), Opener(clock, FASTER))[0] == "fp32"
    again = Opener(clock, FASTER)
    assert chooser.open(released(tmp_path / "4", ["int8"]), again)[0] == "int8" and not again.timed


def test_a_smaller_form_that_fails_its_test_here_is_not_taken_and_tried_with_the_next_release(clock, tmp_path, caplog):
    chooser, release = Chooser(64), released(tmp_path / "r", ["int8"])
    failing = Opener(clock, {"fp32": 0.01, "int8": ReleaseError("golden answers differ by 1")})

    assert chooser.open(release, failing) == ("fp32", failing.forms["fp32"]) and not failing.timed
    assert f"the int8 form of release {release.id} is not used: golden answers differ by 1" in caplog.text

    assert chooser.open(release, Opener(clock, FASTER))[0] == "int8"
    assert chooser.open(release, failing) == ("fp32", failing.forms["fp32"]) and not failing.timed


def test_what_fp32_raises_is_raised(clock, tmp_path):
    with pytest.raises(ReleaseError, match="damaged"):
        Chooser(64).open(released(tmp_path / "r", ["int8"]), Opener(clock, FASTER | {"fp32": ReleaseError("damaged")}))


def test_on_a_gpu_forms_for_cpus_alone_are_not_opened(clock, tmp_path):
    opener = Opener(clock, FASTER | {"fp16": 0.005}, "CUDAExecutionProvider")

    assert Chooser(64).open(released(tmp_path / "r", ["fp16", "int8"]), opener)[0] == "fp16"

    assert PRECISIONS["int8"].cpu_only and opener.opened == ["fp32", "fp16"]


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> State:
    """Commit 1 is in fp32 alone, commits 2 and 3 have int8 beside it."""
    state = State(tmp_path_factory.mktemp("state"))
    state.commit(Toy(5, native_tower()))
    exporter = OnnxExporter(max_batch=4, precisions=("int8",), traces=user_cache())
    images = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    for number in (2, 3):
        torch.manual_seed(number)
        folder = state.path / "commits" / f"{number:06d}" / "release"
        assert exporter.release(Toy(4 + number, native_tower()), PREPROCESS, FACTS, folder, images).offers("int8")
    return state


def test_the_form_that_was_found_answers_as_if_it_had_been_asked_for(state):
    state.point(2)

    found = Classifier(state.path, threads=1, precision=AUTO)

    assert found.precision in ("fp32", "int8")
    asked = Classifier(state.path, threads=1, precision=found.precision)
    assert found.classify([picture(1)], top=0) == asked.classify([picture(1)], top=0)


@pytest.mark.parametrize("chosen", ["fp32", "int8"])
def test_the_release_before_answers_until_the_choice_is_made(state, monkeypatch, chosen):
    asked, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> Timing:
        asked.set()
        assert go_on.wait(20)
        return Timing(chosen, {}, {})

    monkeypatch.setattr(timing, "fastest", slow)
    state.point(1)
    classifier = Classifier(state.path, threads=1, precision=AUTO)
    state.point(2)
    refreshing = threading.Thread(target=classifier.refresh)
    refreshing.start()
    try:
        assert asked.wait(20)
        assert len(classifier.classify([picture(1)], top=0)[0].labels) == 5 and classifier.precision == "fp32"
    finally:
        go_on.set()
        refreshing.join(20)
    assert len(classifier.classify([picture(1)], top=0)[0].labels) == 6 and classifier.precision == chosen

    # The next one has the same structure: `slow` is not asked.
    asked.clear()
    state.point(3)
    assert classifier.refresh() and classifier.precision == chosen and not asked.is_set()


def test_a_server_answers_in_the_form_that_it_found_and_shows_it(state, monkeypatch):
    monkeypatch.setattr(timing, "fastest", lambda *arguments: Timing("int8", {}, {}))
    state.point(2)

    with serving(state.path, precision=AUTO) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        status, answer = ask(server, "/v1/classify?top=0", png(picture(1)))
        metrics = ask(server, "/metrics")[1]

    assert status == 200
    [want] = Classifier(state.path, threads=1, precision="int8").classify([png(picture(1))], top=0)
    assert answer["predictions"] == [{"labels": list(want.labels), "scores": list(want.scores)}]
    assert 'precision="int8"' in metrics


def test_a_form_is_tested_with_its_own_tolerance(state, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(timing, "fastest", lambda *arguments: Timing("int8", {}, {}))
    state.point(2)
    folder = state.path / "commits" / "000002" / "release"
    copy = tmp_path / "release"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    values = json.loads((copy / "release.json").read_text())
    values["variants"]["int8"]["atol"] = 1e-9
    del values["sha256"]
    (copy / "release.json").write_text(json.dumps(values))

    assert Classifier(folder, threads=1, precision=AUTO).precision == "int8"
    assert Classifier(copy, threads=1, precision=AUTO).precision == "fp32"
    assert "the int8 form" in caplog.text and "at most 1e-09 is allowed" in caplog.text
