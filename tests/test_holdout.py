import errno
import hashlib
import io
import logging
import os
import random
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.scoring.holdout import HoldOut, HoldOutError, TrainedFilter
from exporter import files


@dataclass(frozen=True)
class FakeSample:
    label: str
    image: bytes

    def read(self) -> bytes:
        return self.image


def qualifying(count: int, fraction: float = 0.1, start: int = 0) -> list[bytes]:
    """Images whose hash is in the first `fraction` of the hash space."""
    found: list[bytes] = []
    while len(found) < count:
        image = b"image %d" % start
        if hashlib.sha256(image).digest()[0] < int(fraction * 256):
            found.append(image)
        start += 1
    return found


def others(count: int, fraction: float = 0.1) -> list[bytes]:
    """Images whose hash is not."""
    return [image for i in range(20 * count) if _share(image := b"image %d" % i) >= fraction][:count]


def _share(image: bytes) -> float:
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "big") / 2**64


def samples(label: str, images: list[bytes]) -> list[FakeSample]:
    return [FakeSample(label, image) for image in images]


def random_tasks(seed: int, tasks: int = 12, size: int = 60) -> list[list[FakeSample]]:
    """Streams with duplicates, returning classes, one image under several names, classes of a single sample."""
    draw = random.Random(seed)
    pool = [b"%d/%d" % (seed, i) for i in range(250)]
    names = [f"class {i}" for i in range(8)]
    stream = []
    for _ in range(tasks):
        few = draw.sample(names, draw.randint(1, 4))
        stream.append([FakeSample(draw.choice(few), draw.choice(pool)) for _ in range(draw.choice([1, 2, size]))])
    return stream


def play(
    stream: list[list[FakeSample]], folder: Path, fraction: float = 0.4, per_class: int = 5, restart: bool = False
):
    """Runs tasks through a hold-out, a commit folder each. Gives all choices and the final hold-out."""
    holdout, parent, choices = HoldOut.load(None, fraction, per_class), None, []
    for number, task in enumerate(stream, 1):
        if restart:
            holdout = HoldOut.load(parent, fraction, per_class)
        choices.append(holdout.split(task))
        commit = folder / f"{number:06d}"
        commit.mkdir(parents=True)
        holdout.write(commit, parent)
        parent = commit
    return choices, holdout


@pytest.mark.parametrize("seed", range(20))
def test_no_image_is_ever_both_trained_on_and_held_out(seed: int, tmp_path: Path) -> None:
    # given a stream with duplicates, conflicting labels and returning classes
    stream = random_tasks(seed)

    # when it runs through
    choices, holdout = play(stream, tmp_path)

    # then over the whole history the trained and the held images have nothing in common
    pairs = [
        (choice, sample.image)
        for task, made in zip(stream, choices, strict=True)
        for sample, choice in zip(task, made, strict=True)
    ]
    trained = {image for choice, image in pairs if choice == "train"}
    held = [image for choice, image in pairs if choice == "hold"]
    assert held, "the stream should hold something out"
    assert not trained & set(held)
    assert len(held) == len(set(held)) == len(holdout)
    # and whatever was dropped is a copy of a held image
    assert {image for choice, image in pairs if choice == "drop"} <= set(held)
    # and no class has more than its bound
    assert max(Counter(image.label for image in holdout.images()).values()) <= 5


@pytest.mark.parametrize("seed", range(5))
def test_every_class_of_a_task_keeps_an_image_to_train_on_unless_all_were_held_before(
    seed: int, tmp_path: Path
) -> None:
    stream = random_tasks(seed)
    choices, _ = play(stream, tmp_path, fraction=0.95, per_class=1000)
    held: set[bytes] = set()
    for task, made in zip(stream, choices, strict=True):
        for label in {sample.label for sample in task}:
            mine = [(sample.image, choice) for sample, choice in zip(task, made, strict=True) if sample.label == label]
            if any(image not in held for image, _ in mine):
                assert "train" in [choice for _, choice in mine]
        held |= {sample.image for sample, choice in zip(task, made, strict=True) if choice == "hold"}


@pytest.mark.parametrize("seed", range(5))
def test_a_run_restarted_before_every_task_makes_the_same_choices_and_the_same_files(seed: int, tmp_path: Path) -> None:
    stream = random_tasks(seed)
    steady, _ = play(stream, tmp_path / "steady")
    resumed, _ = play(stream, tmp_path / "resumed", restart=True)

    assert resumed == steady
    last = f"{len(stream):06d}"
    for path in sorted((tmp_path / "steady" / last / "holdout").iterdir()):
        assert (tmp_path / "resumed" / last / "holdout" / path.name).read_bytes() == path.read_bytes()


def test_a_single_sample_of_a_class_is_trained_on_and_stays_out_of_the_hold_out_when_it_comes_again(
    tmp_path: Path,
) -> None:
    # given a qualifying image that is all there is of its class
    first, second, third = qualifying(3)
    holdout = HoldOut.load(None, 0.1, 50)
    assert holdout.split(samples("wren", [first])) == ["train"]
    holdout.write(tmp_path, None)

    # when it comes again among others
    again = holdout.split(samples("wren", [first, second, third]))

    # then only others are held out
    assert again == ["train", "hold", "hold"]


def test_beyond_the_bound_a_qualifying_image_is_trained_on_under_every_name() -> None:
    one, two = qualifying(2)
    plain = others(2)
    holdout = HoldOut.load(None, 0.1, 1)

    choices = holdout.split([*samples("wren", [one, two, plain[0]]), *samples("robin", [two, plain[1]])])

    assert choices == ["hold", "train", "train", "train", "train"]


def test_a_copy_of_a_held_image_is_dropped_under_every_name(tmp_path: Path) -> None:
    [image], plain = qualifying(1), others(3)
    holdout = HoldOut.load(None, 0.1, 50)

    within = holdout.split([*samples("wren", [image, image, plain[0]]), *samples("robin", [image, plain[1]])])
    holdout.write(tmp_path, None)
    later = holdout.split(samples("finch", [image, plain[2]]))

    assert within == ["hold", "drop", "train", "drop", "train"]
    assert later == ["drop", "train"]


def test_a_split_that_is_not_written_leaves_no_trace() -> None:
    # given a failed first attempt at a task
    images = qualifying(4) + others(4)
    holdout = HoldOut.load(None, 0.1, 2)
    first = holdout.split(samples("wren", images))

    # when the task is split again
    second = holdout.split(samples("wren", images))

    # then the answer is the same
    assert second == first
    assert [image.label for image in holdout.images()] == ["wren", "wren"]


def test_about_the_configured_share_is_held_out_and_none_when_it_is_zero() -> None:
    images = samples("wren", [b"%d" % i for i in range(5000)])
    assert HoldOut.load(None, 0.1, 10_000).split(images).count("hold") == pytest.approx(500, abs=75)
    assert HoldOut.load(None, 0.0, 10_000).split(images).count("hold") == 0
    assert HoldOut.load(None, 0.1, 0).split(images).count("hold") == 0


def test_a_commit_is_complete_by_itself_and_its_older_packs_are_links(tmp_path: Path) -> None:
    # given two commits with an image each, under names that are awkward in a path
    [one, two], plain = qualifying(2), others(2)
    first, second = tmp_path / "000001", tmp_path / "000002"
    holdout = HoldOut.load(None, 0.1, 50)
    for commit, parent, label, images in (
        (first, None, "a/b: ÅÄ", [one, plain[0]]),
        (second, first, "..", [two, plain[1]]),
    ):
        commit.mkdir()
        holdout.split(samples(label, images))
        holdout.write(commit, parent)

    # then the second shares the first one's pack
    assert (first / "holdout/000001.zip").samefile(second / "holdout/000001.zip")

    # and when the first is pruned, a new process still reads every image from the second
    for path in (first / "holdout").iterdir():
        path.unlink()
    images = HoldOut.load(second, 0.1, 50).images()
    assert {image.label: image.read() for image in images} == {"a/b: ÅÄ": one, "..": two}
    assert [image.key for image in images] == [hashlib.sha256(image).hexdigest() for image in (one, two)]


def test_images_are_readable_before_the_write_after_it_and_after_the_staging_folder_is_renamed(tmp_path: Path) -> None:
    [image], plain = qualifying(1), others(1)
    holdout = HoldOut.load(None, 0.1, 50)
    holdout.split(samples("wren", [image, *plain]))
    images = holdout.images()
    assert [held.read() for held in images] == [image]

    staging, commit = tmp_path / "000001.staging", tmp_path / "000001"
    staging.mkdir()
    holdout.write(staging, None)
    assert [held.read() for held in images] == [image]

    staging.rename(commit)
    holdout.moved(commit)
    assert [held.read() for held in images] == [image]


def test_images_of_several_packs_can_be_read_from_several_threads(tmp_path: Path) -> None:
    images, plain = qualifying(40), others(4)
    holdout, parent = HoldOut.load(None, 0.1, 50), None
    for number in range(4):
        commit = tmp_path / str(number)
        commit.mkdir()
        holdout.split(samples("wren", [*images[number::4], plain[number]]))
        holdout.write(commit, parent)
        parent = commit
    held = sorted(holdout.images(), key=lambda image: image.key)

    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda image: image.read(), held * 5))

    assert [hashlib.sha256(data).hexdigest() for data in read] == [image.key for image in held * 5]


def test_packs_are_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError("links are not supported here")

    [image], plain = qualifying(1), others(1)
    first, second = tmp_path / "1", tmp_path / "2"
    holdout = HoldOut.load(None, 0.1, 50)
    first.mkdir()
    holdout.split(samples("wren", [image, *plain]))
    holdout.write(first, None)
    monkeypatch.setattr(os, "link", no_links)
    second.mkdir()
    holdout.split([])
    holdout.write(second, first)

    assert (second / "holdout/000001.zip").read_bytes() == (first / "holdout/000001.zip").read_bytes()


def test_the_share_can_be_lowered_but_not_raised_for_a_state_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holdout = HoldOut.load(None, 0.1, 50)
    holdout.split([])
    holdout.write(tmp_path, None)

    assert HoldOut.load(tmp_path, 0.05, 50).fraction == 0.05
    with caplog.at_level(logging.WARNING):
        assert HoldOut.load(tmp_path, 0.2, 50).fraction == 0.1
    assert "evaluation.holdout_fraction is 0.2" in caplog.text


def two_packs(folder: Path) -> tuple[Path, list[bytes]]:
    """A commit with two packs of an image each."""
    first, second = folder / "1", folder / "2"
    images, plain = qualifying(2), others(2)
    holdout, parent = HoldOut.load(None, 0.1, 50), None
    for commit, image, other in zip((first, second), images, plain, strict=True):
        commit.mkdir()
        holdout.split(samples("wren", [image, other]))
        holdout.write(commit, parent)
        parent = commit
    holdout.close()
    return second, images


def test_a_damaged_pack_costs_its_images_and_is_not_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit, [one, two] = two_packs(tmp_path)
    pack = commit / "holdout/000001.zip"
    whole = pack.read_bytes()

    # when any bit is flipped, or the pack ends early
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    lost = 0
    for data in [*damaged, whole[:-1], whole[: len(whole) // 2], b""]:
        pack.write_bytes(data)
        held = {image.read() for image in HoldOut.load(commit, 0.1, 50).images()}

        # then the images of the other pack are there, and none is wrong
        assert two in held and held <= {one, two}
        lost += one not in held

    assert lost > len(whole) / 2  # other bits, such as those of a date, change no image
    assert "000001.zip is damaged" in caplog.text

    # and the next commit has only what is intact
    pack.write_bytes(b"not a zip")
    holdout, following = HoldOut.load(commit, 0.1, 50), tmp_path / "3"
    following.mkdir()
    holdout.split([])
    holdout.write(following, commit)
    assert {path.name for path in (following / "holdout").iterdir()} == {"000002.zip", "trained.zip"}


@pytest.mark.parametrize("times", [2, 99])
def test_a_disk_that_cannot_read_a_pack_is_asked_again_and_costs_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    commit, _ = two_packs(tmp_path)
    monkeypatch.setattr(files, "READ_PAUSE_S", 0)
    real, left = io.open, [times]

    def broken(path, *arguments, **options):
        if str(path).endswith("000001.zip") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(io, "open", broken)
    if times == 2:
        assert len(HoldOut.load(commit, 0.1, 50).images()) == 2
    else:
        with pytest.raises(HoldOutError, match=r"000001\.zip cannot be read: Input/output error; mend the disk"):
            HoldOut.load(commit, 0.1, 50)


def test_entries_are_stored_as_percent_encoded_name_and_hash(tmp_path: Path) -> None:
    [image], plain = qualifying(1), others(1)
    holdout = HoldOut.load(None, 0.1, 50)
    holdout.split(samples("great tit", [image, *plain]))
    holdout.write(tmp_path, None)

    with zipfile.ZipFile(tmp_path / "holdout/000001.zip") as pack:
        [entry] = pack.infolist()
        assert entry.filename == f"great%20tit/{hashlib.sha256(image).hexdigest()}"
        assert entry.compress_type == zipfile.ZIP_STORED


def test_the_filter_forgets_nothing_and_is_rarely_wrong_about_what_it_never_saw() -> None:
    digests = [hashlib.sha256(b"%d" % i).digest() for i in range(60_000)]
    trained = TrainedFilter()
    for digest in digests[:40_000]:
        trained.add(digest)

    assert all(digest in trained for digest in digests[:40_000])
    assert sum(digest in trained for digest in digests[40_000:]) < 20
    assert digests[0] in TrainedFilter(bytes(trained))


@pytest.mark.parametrize("seed", range(10))
def test_joined_hold_outs_hold_no_image_that_any_learner_trained_on_or_will(seed: int, tmp_path: Path) -> None:
    # given three learners whose streams have images in common, the second with a smaller fraction
    stream = random_tasks(seed, tasks=16)
    parts, fractions = (stream[:4], stream[4:8], stream[8:12]), (0.4, 0.3, 0.4)
    played = [
        play(part, tmp_path / f"{number}", fractions[number], per_class=5 + number) for number, part in enumerate(parts)
    ]

    # when their hold-outs are joined, and the merged learner goes on after a restart
    joined = HoldOut.load(None, 0.9, 7)
    joined.join([holdout for _, holdout in played], {"class 1": "Class 1"})
    held = {image.key: image.read() for image in joined.images()}
    commits = [tmp_path / "merged" / number for number in ("000001", "000002")]
    for commit in commits:
        commit.mkdir(parents=True)
    joined.write(commits[0], None)
    again = HoldOut.load(commits[0], 0.9, 7)
    assert {image.key: image.read() for image in again.images()} == held
    later = [sample for task in stream[12:] for sample in task] + [s for task in stream[:12] for s in task]
    chosen = again.split(later)
    again.write(commits[1], commits[0])

    # then no image is held that anyone trained on
    pairs = [pair for (choices, _), part in zip(played, parts, strict=True) for pair in zip(choices, part, strict=True)]
    trained = {s.image for made, task in pairs for choice, s in zip(made, task, strict=True) if choice == "train"}
    trained |= {sample.image for choice, sample in zip(chosen, later, strict=True) if choice == "train"}
    assert held and not trained & {image.read() for image in again.images()}
    # and the bounds are those of the strictest
    assert again.fraction == joined.fraction == 0.3
    assert all(_share(image) < 0.3 for image in held.values())
    labels = Counter(image.label for image in again.images())
    assert max(labels.values()) <= 7 and "class 1" not in {image.label for image in joined.images()}


def test_who_remembers_no_training_image_leaves_nothing_to_hold_out(tmp_path: Path) -> None:
    _, some = play(random_tasks(1), tmp_path / "a")
    _, none = play(random_tasks(2), tmp_path / "b", fraction=0)
    assert len(some)
    for order in ([some, none], [none, some]):
        joined = HoldOut.load(None, 0.4, 5)
        joined.join(order, {})
        assert len(joined) == 0 and joined.fraction == 0


def test_the_order_of_joined_hold_outs_changes_nothing(tmp_path: Path) -> None:
    parts = [play(random_tasks(3, tasks=12)[start::3], tmp_path / f"{start}")[1] for start in range(3)]
    made = []
    for order in (parts, parts[::-1]):
        joined = HoldOut.load(None, 0.4, 3)
        joined.join(order, {})
        made.append(sorted(image.key for image in joined.images()))
    assert made[0] and made[0] == made[1]
