"""What is computed and written again after every task is what has changed since: the rest is taken from before."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from agent.commits import sealed
from agent.scoring import evaluator as evaluators
from agent.scoring.holdout import HoldOut
from agent.scoring.scored_images import ScoredImages, image_refs
from agent.sealing import seal
from exporter import text_export
from exporter.tensors import Unchanged
from tests.test_commits import committed, store_on
from tests.test_evaluator import (
    DECODERS,
    FakeClip,
    FakeFolder,
    FakeMethod,
    FakeModule,
    FakeSample,
    evaluator,
    image,
    learn,
    right_names,
    task,
)
from tests.test_text import Exports
from tests.tiny import tiny_clip

FOLDER = FakeFolder(**{name: [image(name, i) for i in range(4)] for name in ("red", "lime", "green", "blue")})


def test_test_images_go_through_the_towers_again_only_when_these_have_changed(monkeypatch) -> None:
    # given a task of two classes, and no examples, which are always of a few images
    monkeypatch.setattr(evaluators, "CANDIDATES", 0)
    clip, right = FakeClip(), right_names()
    method, scorer = FakeMethod(clip), evaluator(clip, FOLDER)
    first = learn(scorer, method, task(clip, 1, ["red", "lime"]), {n: right[n] for n in ("red", "lime")}, None)
    before = clip.embedded

    # when another brings a class, with the towers as they were
    second = learn(scorer, method, task(clip, 2, ["green"]), {"green": right["green"]}, first)

    # then its image was predicted, its test images alone were encoded, and the scores are those of all
    assert clip.embedded - before == 1 + 4 and second.test_images == 12 and second.accuracy == 1.0

    # when the towers change
    clip.towers = torch.ones(1)
    before = clip.embedded
    third = learn(scorer, method, task(clip, 3, ["blue"]), {"blue": right["blue"]}, second)

    # then all are encoded
    assert clip.embedded - before == 1 + 16 and third.test_images == 16


def test_scores_are_the_same_whatever_memory_there_is_for_what_was_encoded() -> None:
    # given images whose tokens take 300 bytes each and what is encoded of them 12
    found = {}
    for cache_bytes in (0, 12 * 5, 300 * 3, 300 * 16, 2**20):
        clip = FakeClip()
        images = ScoredImages(clip, 3, DECODERS, cache_bytes)  # type: ignore[arg-type]
        refs = [ref for name in FOLDER.classes for ref in image_refs(FOLDER, name, 0)]
        numbers = images.add(refs, lambda: None)
        module = FakeModule(clip, right_names())
        for _ in range(2):
            decoded = clip.encoded
            answers = [module.answer(encoded)[2] for _, encoded in images.encoded(numbers, module)]
        found[cache_bytes] = torch.cat(answers)
        kept = sum(row.nbytes for rows in (images._tokens, *images._encoded.values()) for row in rows.values())
        # when they are asked for again, then nothing is decoded where memory reaches for what was encoded
        assert (clip.encoded == decoded) == (cache_bytes >= 12 * 16)
        assert kept <= cache_bytes and kept + images._free_bytes == cache_bytes
    assert all(torch.equal(answers, found[0]) for answers in found.values())


def test_class_names_are_encoded_again_only_when_the_text_tower_has_changed() -> None:
    clip, right = FakeClip(), right_names()
    method, scorer = FakeMethod(clip), evaluator(clip, FOLDER)
    first = learn(scorer, method, task(clip, 1, ["red", "lime"]), {n: right[n] for n in ("red", "lime")}, None)
    method.asked.clear()
    second = learn(scorer, method, task(clip, 2, ["green"]), {"green": right["green"]}, first)
    assert "red" not in method.asked and "lime" not in method.asked

    method.names["green"] = -method.names["green"]
    method.asked.clear()
    learn(scorer, method, task(clip, 3, ["blue"]), {"blue": right["blue"]}, second)
    assert {"red", "lime", "green", "blue"} <= set(method.asked)


def test_of_more_held_out_images_than_are_scored_each_class_has_the_same_share(tmp_path, monkeypatch) -> None:
    # given ten images held out of one class and two of the other, and room for eight
    monkeypatch.setattr(evaluators, "SCORED", 8)
    clip, right = FakeClip(), right_names()
    holdout = HoldOut(0.999999, 100)
    held = [FakeSample("red", image("red", i)) for i in range(11)]
    held += [FakeSample("lime", image("lime", i)) for i in range(3)]
    holdout.split(held)
    counts = {name: sum(ref.label == name for ref in holdout.images()) for name in ("red", "lime")}
    assert counts["red"] > 4 > counts["lime"]
    scorer = evaluator(clip, FakeFolder(red=[image("red", 50 + i) for i in range(6)], lime=[]), holdout=holdout)

    report = learn(
        scorer, FakeMethod(clip), task(clip, 1, ["red", "lime"]), {n: right[n] for n in ("red", "lime")}, None
    )

    # then four of the one, all of the other, and all test images
    assert report.test_images == 4 + counts["lime"] + 6
    assert report.held_out == len(holdout) == sum(counts.values())


def test_what_the_last_commit_has_too_is_neither_read_nor_forced_to_the_disk_again(tmp_path, monkeypatch) -> None:
    # given a commit, and the next one with a link to a pack of it, and with a file of the same name but its own
    store = store_on(tmp_path)
    parent = committed(store, 1).path
    staging = store.stage()
    (staging / "holdout").mkdir()
    (staging / "holdout/000001.zip").hardlink_to(parent / "holdout/000001.zip")
    (staging / "holdout/trained.zip").write_text("another filter")
    (staging / "report.json").write_text((parent / "report.json").read_text())
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(Path(f"/proc/self/fd/{number}").readlink()), fsync(number))
    )

    files = seal(staging, parent)

    assert files == seal(staging)
    assert synced.count(staging / "holdout/000001.zip") == 1  # by the second one
    assert synced.count(staging / "report.json") == synced.count(staging / "holdout/trained.zip") == 2
    # and damage since then is not made good by a new hash
    (parent / "holdout/000001.zip").write_text("damage")
    assert seal(staging, parent) == files


@pytest.mark.parametrize("damage", ["missing", "no json", "[]", "{}", "altered"])
def test_a_damaged_manifest_vouches_for_nothing(tmp_path, damage) -> None:
    parent = committed(store_on(tmp_path), 1).path
    manifest = parent / "manifest.json"
    assert "holdout/000001.zip" in sealed(parent)
    if damage == "missing":
        manifest.unlink()
    elif damage == "altered":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tasks": 7}))
    else:
        manifest.write_text(damage)
    assert sealed(parent) == {}
    assert seal(parent)  # and sealing goes on without it


def test_a_release_encodes_only_names_that_it_has_not_encoded_with_the_same_tower(tmp_path, monkeypatch) -> None:
    # given three names that are encoded together
    monkeypatch.setattr(text_export, "_NAMES_AT_ONCE", 3)
    clip = tiny_clip()
    maker, names = Exports(clip, tmp_path), [f"thing {i}" for i in range(8)]
    asked: list[str] = []
    encode = text_export._embeddings
    monkeypatch.setattr(text_export, "_embeddings", lambda module, part: (asked.extend(part), encode(module, part))[1])

    def released_rows(count: int, adapted: float = 0.0) -> np.ndarray:
        asked.clear()
        return np.load(maker.release(adapted, names[:count]).path / "text.npy")

    # when more classes come, then what was encoded together and is still so is taken from before, bit for bit
    first, second = released_rows(4), released_rows(8)
    assert [name for name in asked if name in names] == names[3:]
    assert np.array_equal(first[:3], second[:3])
    assert np.array_equal(np.load(Exports(clip, tmp_path / "anew").release(0.0, names).path / "text.npy"), second)

    # and when the tower changes, all are encoded
    released_rows(8, adapted=1.0)
    assert [name for name in asked if name in names] == names


def test_tensors_are_unchanged_while_names_shapes_and_values_are() -> None:
    unchanged = Unchanged()
    one = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert [unchanged(one), unchanged(one), unchanged({name: t.clone() for name, t in one.items()})] == [
        False,
        True,
        True,
    ]
    for other in ({"a": one["a"]}, one, {**one, "b": torch.ones(3)}, {**one, "b": torch.zeros(3, 1)}):
        assert not unchanged(other)
        assert unchanged(other)
    assert not unchanged({**one, "b": torch.zeros(3, 1, dtype=torch.float64)})
