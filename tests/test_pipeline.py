"""The agent's loop, with a learner that knows exactly what it was given, once and in order."""

import json
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from agent.commits import CommitStore, StateError
from agent.pipeline import HALVINGS, RANK_ATTEMPTS, AgentError, TaskFailed, resume
from agent.values import Progress
from agent.worker import WorkerDied
from exporter.metrics import Metrics
from streams.buffer import CutRule
from streams.record import Control, ControlKind, Partition, Reason, Record, Rejected
from streams.source import DeadLetterDelayed, DeadLetterError, PositionError
from tests.fakes import (
    FAULTS,
    LIST,
    InlineWorker,
    ListSource,
    MemoryDeadLetters,
    learned,
    pipeline,
    records,
)

TEN = [f"image {n}" for n in range(10)]


def rejected(offset: int) -> Rejected:
    return Rejected(LIST, offset, Reason.TRUNCATED, "cut short")


class OneTaskWorker(InlineWorker):
    """Sets `stop` when it has learned its first task."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self.stopped_within = None
        self._stop = stop

    def poll(self):
        news = super().poll()
        if news is not None:
            self._stop.set()
        return news

    def stop(self, timeout_s):
        self.stopped_within = timeout_s


class DyingWorker(InlineWorker):
    """Fails with each of `deaths` before it works."""

    def __init__(self, *deaths: WorkerDied) -> None:
        super().__init__()
        self._deaths = list(deaths)

    def poll(self):
        if self._deaths:
            self._task = None
            raise self._deaths.pop(0)
        return super().poll()


def test_everything_is_learned_once_and_in_order(tmp_path):
    # given ten records and tasks of three
    source = ListSource(records(*TEN))

    # when
    commit = pipeline(tmp_path, source).run()

    # then
    assert learned(commit) == list(range(10))
    assert (commit.tasks, commit.offsets) == (4, {LIST: 10})
    assert source.acknowledged == [{LIST: 3}, {LIST: 6}, {LIST: 9}, {LIST: 10}]
    assert commit.totals["samples"] == 10


def test_learning_goes_on_where_the_last_commit_ends(tmp_path):
    # given an agent that stopped after its first task
    stop = threading.Event()
    first = pipeline(tmp_path / "a", ListSource(records(*TEN)), OneTaskWorker(stop), stop=stop)
    assert first.run().tasks == 1
    first.commits.close()

    # when another takes over, and a third was never interrupted
    resumed = pipeline(tmp_path / "a", ListSource(records(*TEN), batch=2)).run()
    undisturbed = pipeline(tmp_path / "b", ListSource(records(*TEN))).run()

    # then
    assert (resumed.path / "learner.safetensors").read_bytes() == (
        undisturbed.path / "learner.safetensors"
    ).read_bytes()
    assert (resumed.offsets, resumed.totals, resumed.tasks) == (undisturbed.offsets, undisturbed.totals, 4)


def test_at_a_stop_an_unfinished_task_is_kept_for_the_next_start(tmp_path):
    stop = threading.Event()
    worker = OneTaskWorker(stop)
    commit = pipeline(tmp_path, ListSource(records(*TEN), live=True), worker, stop=stop, stop_timeout_s=5).run()
    assert learned(commit) == [0, 1, 2]
    assert worker.stopped_within == 5


def test_at_a_stop_what_was_read_is_learned_when_so_configured(tmp_path):
    # given a source that never ends, of which 7 records come in the first poll
    stop = threading.Event()
    source = ListSource(records(*TEN), batch=7, live=True)
    rules = {"learn_at_stop": True}

    # when
    agent = pipeline(tmp_path, source, OneTaskWorker(stop), stop=stop, rule=CutRule(samples=5), **rules)
    commit = agent.run()

    # then no more is read, and nothing read is left
    assert learned(commit) == list(range(len(learned(commit))))
    assert len(learned(commit)) in (7, 10)
    assert commit.offsets == {LIST: len(learned(commit))}


def test_at_the_end_of_the_stream_the_rest_can_be_kept(tmp_path):
    commit = pipeline(tmp_path, ListSource(records(*TEN)), learn_at_end=False).run()
    assert commit.offsets == {LIST: 9}


class NewestFirst(ListSource):
    """A live stream that begins at its newest record, wherever that is when it is asked."""

    def seek(self, offsets, epochs=None):
        super().seek(offsets or {LIST: len(self.items)})


def test_where_a_live_stream_begins_is_durable_before_anything_is_taken_of_it(tmp_path):
    # given an agent that was stopped before it had read anything, and another before it had learned anything
    source, stop = NewestFirst(records("old"), live=True), threading.Event()
    stop.set()
    first = pipeline(tmp_path, source, stop=stop)
    commit = first.run()
    assert (commit.number, commit.offsets, commit.tasks, commit.release) == (1, {LIST: 1}, 0, None)
    assert source.acknowledged == [{LIST: 1}] and first.metrics.status()["commit"]["tasks"] == 0
    first.commits.close()

    # when more has come since
    stop = threading.Event()
    source = NewestFirst(records("old", "a", "b", "c"), live=True)
    second = pipeline(tmp_path, source, OneTaskWorker(stop), stop=stop)

    # then it is learned, and no commit was made that says what the one before did
    assert learned(second.run()) == [1, 2, 3]
    assert second.commit.number == 2


def test_an_archive_has_no_commit_before_something_is_learned(tmp_path):
    source = ListSource(records(*TEN))
    agent = pipeline(tmp_path, source)
    source.positions = {LIST: 0}
    assert agent.run().number == 4


def test_nothing_is_committed_before_the_source_vouches_for_it(tmp_path):
    # given a source that is asked twice before it knows, and then says that it is another stream
    answers = [False, True, False, PositionError("created again")]

    class Another(ListSource):
        def vouches(self, timeout_s):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    # when
    agent = pipeline(tmp_path, Another(records(*TEN)))
    with pytest.raises(PositionError, match="created again"):
        agent.run()

    # then
    assert learned(agent.commits.current()) == [0, 1, 2] and answers == []


def test_a_commit_is_behind_the_marks_that_follow_its_last_record(tmp_path):
    class Marked(ListSource):
        def past_marks(self, offsets):
            return {partition: offset + 1 for partition, offset in offsets.items()}

    source = Marked(records("a", "b", "c", "raise"))
    agent = pipeline(tmp_path, source, quarantine=True)
    assert agent.run().number == 2
    assert source.acknowledged == [{LIST: 4}, {LIST: 5}]


def test_a_commit_keeps_which_history_of_the_stream_it_ends_in(tmp_path):
    class Elected(ListSource):
        def epochs(self, offsets):
            return {partition: 10 + offset for partition, offset in offsets.items()}

    first = pipeline(tmp_path, Elected([*records(*TEN[:4]), rejected(4)]))
    assert first.run().epochs == {LIST: 15}
    assert first.commits.current().epochs == {LIST: 15}
    first.commits.close()
    source = Elected([])
    pipeline(tmp_path, source)
    assert source.resumed_epochs == {LIST: 15}


def test_rejected_records_are_dead_lettered_before_the_commit_that_passes_them(tmp_path):
    # given records rejected at intake and in the trainer
    letters = MemoryDeadLetters()
    source = ListSource([*records("a", "late b"), rejected(2), *records("c", start=3)])

    # when
    agent = pipeline(tmp_path, source, dead_letters=letters)
    commit = agent.run()

    # then
    assert learned(commit) == [0, 3]
    assert [(letter.offset, letter.reason) for letter in letters.acknowledged] == [
        (2, Reason.TRUNCATED),
        (1, Reason.TRUNCATED),
    ]
    assert letters.acknowledged[1].raw.value == b"late b"
    assert source.judgements == [(3, 1)]
    assert commit.totals["rejected_truncated"] == 2


def test_nothing_is_committed_while_dead_letters_are_delayed(tmp_path):
    # given a delay of three flushes
    letters = MemoryDeadLetters([DeadLetterDelayed("broker is away")] * 3)
    source = ListSource([rejected(0), *records("a", "b", start=1)])
    agent = pipeline(tmp_path, source, dead_letters=letters)

    # when
    commit = agent.run()

    # then it was only late
    assert learned(commit) == [1, 2]
    assert [letter.offset for letter in letters.acknowledged] == [0]


def test_dead_letters_that_cannot_be_set_aside_stop_the_agent_without_a_commit(tmp_path):
    letters = MemoryDeadLetters([DeadLetterError("disk is full")])
    agent = pipeline(tmp_path, ListSource([rejected(0), *records("a", start=1)]), dead_letters=letters)
    with pytest.raises(DeadLetterError, match="disk is full"):
        agent.run()
    assert agent.commits.current() is None


@pytest.mark.parametrize("items", [[rejected(0), rejected(1)], [Control(LIST, 0, ControlKind.FLUSH), rejected(1)]])
def test_a_stream_of_nothing_usable_ends_and_is_not_set_aside_again(tmp_path, items):
    # when
    letters = MemoryDeadLetters()
    first = pipeline(tmp_path, ListSource(items), dead_letters=letters)
    commit = first.run()
    first.commits.close()

    # then the offsets are committed, with nothing learned
    assert (commit.offsets, commit.tasks, commit.classes, commit.release) == ({LIST: 2}, 0, (), None)
    assert [letter.offset for letter in letters.acknowledged] == [i.offset for i in items if isinstance(i, Rejected)]

    # and the next start reads nothing, and can learn what comes then
    letters = MemoryDeadLetters()
    again = pipeline(tmp_path, ListSource([*items, *records("a", start=2)]), dead_letters=letters)
    assert learned(again.run()) == [2]
    assert letters.acknowledged == []


def test_rejected_records_after_the_last_task_are_passed(tmp_path):
    first = pipeline(tmp_path, ListSource([*records("a", "b", "c"), rejected(3)]))
    commit = first.run()
    assert (commit.offsets, commit.tasks, learned(commit)) == ({LIST: 4}, 1, [0, 1, 2])


def test_a_killed_agent_does_not_set_aside_again_what_it_rejected_long_before(tmp_path):
    # given a stream of rejected records and marks, one a minute, in which the agent is killed after half an hour
    class Killed(Exception): ...

    class Minutely(ListSource):
        minutes = 0

        def poll(self, timeout_s):
            self.minutes += 1
            if self.minutes == 30:
                raise Killed
            return super().poll(timeout_s)

    items = [*records("a", "b", "c"), *(rejected(n) for n in range(3, 60))]
    items[20] = Control(LIST, 20, ControlKind.TASK_BOUNDARY)
    source = Minutely(items, batch=1)
    letters = MemoryDeadLetters()
    agent = pipeline(tmp_path, source, dead_letters=letters)
    agent.monotonic = lambda: 60.0 * source.minutes
    with pytest.raises(Killed):
        agent.run()
    agent.commits.close()

    # when it is started again
    again = MemoryDeadLetters()
    commit = pipeline(tmp_path, ListSource(items), dead_letters=again).run()

    # then five minutes' worth is set aside twice at most, and the learned commit is kept beside the newest two
    first = {letter.offset for letter in letters.waiting + letters.acknowledged}
    twice = first & {letter.offset for letter in again.acknowledged}
    assert len(twice) <= 6
    assert {letter.offset for letter in letters.acknowledged + again.acknowledged} == {*range(3, 60)} - {20}
    assert (learned(commit), commit.offsets) == ([0, 1, 2], {LIST: 60})
    assert commit.totals["samples"] == 3
    assert (tmp_path / "commits" / "000001").is_dir()


def test_how_near_retention_is_to_what_is_in_no_commit_can_be_watched(tmp_path):
    # given a stream that keeps records for a hundred seconds, and one that is forty seconds old and not learned
    stop = threading.Event()

    class Watching(Metrics):
        def waiting(self, age_s, retention_s):
            super().waiting(age_s, retention_s)
            stop.set()

    source = ListSource([records("a")[0]._replace(timestamp_s=time.time() - 40)], live=True)
    source.retention_s = 100
    agent = pipeline(tmp_path, source, stop=stop)
    registry = CollectorRegistry()
    agent.metrics = Watching(registry)
    agent.run()
    assert 0.4 <= registry.get_sample_value("gapstream_retention_used_ratio") < 0.9


def test_a_task_that_fails_once_is_tried_again_from_the_commit(tmp_path):
    # given a worker that dies in the first and in the third task
    died = WorkerDied("died", "trainer was killed by SIGKILL")
    undisturbed = pipeline(tmp_path / "b", ListSource(records(*TEN))).run()

    # when
    commit = pipeline(tmp_path / "a", ListSource(records(*TEN)), DyingWorker(died)).run()

    # then
    assert (commit.path / "learner.safetensors").read_bytes() == (undisturbed.path / "learner.safetensors").read_bytes()


def test_a_task_that_fails_twice_stops_the_agent_with_nothing_of_it_committed(tmp_path):
    agent = pipeline(tmp_path, ListSource(records("a", "b", "c", "raise", "d", "e", "f")))
    message = r"task 2 \(3 samples up to list/0:6\) failed 2 times \(RuntimeError: told to raise; .* 'quarantine'"
    with pytest.raises(TaskFailed, match=message):
        agent.run()
    assert agent.commits.current().offsets == {LIST: 3}


def test_only_the_samples_for_which_a_task_fails_are_quarantined_when_so_configured(tmp_path):
    # given
    letters = MemoryDeadLetters()
    source = ListSource(records("a", "b", "c", "raise", "d", "e", "f"))

    # when
    commit = pipeline(tmp_path, source, dead_letters=letters, quarantine=True).run()

    # then it is set aside, and the rest is learned on top of what was learned before
    assert learned(commit) == [0, 1, 2, 4, 5, 6]
    assert [(letter.offset, letter.reason) for letter in letters.acknowledged] == [(3, Reason.TASK_FAILED)]
    assert [letter.raw.value for letter in letters.acknowledged] == [b"raise"]
    assert (commit.offsets, commit.tasks) == ({LIST: 7}, 4)
    assert [entry.task for entry in commit.report.history] == [1, 3, 4]
    assert (commit.totals["rejected_task_failed"], commit.totals["samples"], commit.totals["records"]) == (1, 7, 7)


@pytest.mark.parametrize("guilty", [{0}, {63}, {31, 32}, {5, 40, 41}])
def test_guilty_samples_are_found_with_few_attempts(tmp_path, guilty):
    # given a task of 64 samples
    class Counting(InlineWorker):
        failures = 0

        def poll(self):
            try:
                return super().poll()
            except WorkerDied:
                Counting.failures += 1
                raise

    letters = MemoryDeadLetters()
    images = ["raise" if n in guilty else f"image {n}" for n in range(64)]
    agent = pipeline(
        tmp_path, ListSource(records(*images)), Counting(), letters, rule=CutRule(samples=64), quarantine=True
    )

    # when
    commit = agent.run()

    # then
    assert learned(commit) == [n for n in range(64) if n not in guilty]
    assert {letter.offset for letter in letters.acknowledged} == guilty
    assert Counting.failures <= 8 * len(guilty)  # 64, 32, 16, 8, 4, 2, and the one sample twice
    assert commit.offsets == {LIST: 64}


def test_the_halves_of_a_task_pass_no_sample_that_is_not_settled(tmp_path):
    # given a task over two partitions with rejected records between, and one sample that it fails for
    other = Partition("list", 1)
    items = [
        Record(LIST, 4, "cat", b"a"),
        Record(other, 7, "cat", b"b"),
        rejected(5),
        Record(LIST, 6, "cat", b"raise"),
        Record(other, 8, "cat", b"c"),
    ]
    source = ListSource([*items, Rejected(other, 9, Reason.TRUNCATED, "cut short")])

    # when
    letters = MemoryDeadLetters()
    agent = pipeline(tmp_path, source, dead_letters=letters, rule=CutRule(), quarantine=True)
    commit = agent.run()

    # then every commit ends before the next sample that was not settled yet
    assert source.acknowledged == [{LIST: 6, other: 8}, {LIST: 7, other: 8}, {LIST: 7, other: 10}]
    assert (commit.totals["records"], commit.totals["rejected_truncated"]) == (6, 2)
    assert sorted(letter.offset for letter in letters.acknowledged) == [5, 6, 9]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_machine_does_stops_the_agent_and_sets_nothing_aside(tmp_path, fault):
    letters = MemoryDeadLetters()
    agent = pipeline(tmp_path, ListSource(records("a", "b", "c", f"break {fault}")), None, letters, quarantine=True)
    with pytest.raises(TaskFailed, match="not known to be the reason, so none is set aside"):
        agent.run()
    assert letters.acknowledged == letters.waiting == []
    assert agent.commits.current().offsets == {LIST: 3}


@pytest.mark.parametrize("kind", ["died", "silent"])
def test_a_trainer_that_is_killed_blames_no_task(tmp_path, kind):
    died = WorkerDied(kind, "trainer was killed by SIGKILL (out of memory?)")
    letters = MemoryDeadLetters()
    agent = pipeline(tmp_path, ListSource(records(*TEN)), DyingWorker(died, died), letters, quarantine=True)
    with pytest.raises(TaskFailed, match="SIGKILL"):
        agent.run()
    assert letters.acknowledged == letters.waiting == []


def test_ranks_that_are_lost_end_more_attempts_than_other_faults_before_they_end_the_agent(tmp_path):
    # given as many losses as may be, and one more
    lost = WorkerDied("rank", "RankLost: rank 1, there (process 7, cuda:0), is gone")
    few = DyingWorker(*[lost] * (RANK_ATTEMPTS - 1))
    assert pipeline(tmp_path / "few", ListSource(records(*TEN)), few).run().offsets == {LIST: 10}

    # when, then
    agent = pipeline(tmp_path / "many", ListSource(records(*TEN)), DyingWorker(*[lost] * RANK_ATTEMPTS))
    with pytest.raises(TaskFailed, match=f"failed {RANK_ATTEMPTS} times"):
        agent.run()


def test_a_first_task_can_be_quarantined(tmp_path):
    commit = pipeline(tmp_path, ListSource(records("raise", "a", "b", "c")), quarantine=True).run()
    assert learned(commit) == [1, 2, 3]


def test_a_quarantine_larger_than_one_pass_is_complete_before_its_commit(tmp_path):
    # given a task in which everything is bad: after HALVINGS the parts that fail are set aside whole
    letters = MemoryDeadLetters()
    images = ["raise"] * 1000
    agent = pipeline(tmp_path, ListSource(records(*images)), dead_letters=letters, rule=CutRule(), quarantine=True)
    commit = agent.run()
    assert (commit.offsets, commit.totals["rejected_task_failed"]) == ({LIST: 1000}, 1000)
    assert commit.tasks == HALVINGS + 1
    assert [letter.offset for letter in letters.acknowledged] == list(range(1000))


def test_failures_of_different_tasks_do_not_add_up(tmp_path):
    class FailsEveryTaskOnce(InlineWorker):
        def poll(self):
            if self._task is not None and self._task[0].number not in failed:
                failed.add(self._task[0].number)
                self._task = None
                raise WorkerDied("error", "once")
            return super().poll()

    failed: set[int] = set()
    commit = pipeline(tmp_path, ListSource(records(*TEN)), FailsEveryTaskOnce()).run()
    assert learned(commit) == list(range(10))
    assert failed == {1, 2, 3, 4}


def test_a_trainer_that_cannot_be_set_up_stops_the_agent_at_once(tmp_path):
    died = WorkerDied("start", "ValueError: no weights", blames_task=False)
    with pytest.raises(AgentError, match="the trainer could not be set up: ValueError: no weights"):
        pipeline(tmp_path, ListSource([], live=True), DyingWorker(died), quarantine=True).run()


def test_no_task_is_quarantined_for_a_trainer_that_dies_before_it_is_set_up(tmp_path):
    died = WorkerDied("died", "trainer was killed by SIGKILL", blames_task=False)
    letters = MemoryDeadLetters()
    agent = pipeline(tmp_path, ListSource(records(*TEN)), DyingWorker(died, died), letters, quarantine=True)
    with pytest.raises(TaskFailed):
        agent.run()
    assert letters.acknowledged == letters.waiting == []


def test_no_task_is_quarantined_for_a_disk_that_refuses(tmp_path):
    class FullDisk(InlineWorker):
        def submit(self, task, staging, commit):
            super().submit(task, staging, commit)
            (staging / "learner.safetensors").symlink_to("/dev/full")

    letters = MemoryDeadLetters()
    worker = FullDisk()
    with pytest.raises(TaskFailed, match="No space left on device"):
        pipeline(tmp_path, ListSource(records(*TEN)), worker, letters, quarantine=True).run()
    assert letters.acknowledged == letters.waiting == []


def test_a_commit_of_another_stream_is_refused(tmp_path):
    # given
    first = pipeline(tmp_path, ListSource(records(*TEN), fingerprint="one"))
    first.run()

    # when, then
    with pytest.raises(PositionError, match=r"fingerprint one, this one has other.*state.path to a new folder"):
        resume(first.commits, ListSource(records(*TEN), fingerprint="other"))


def test_classes_of_a_quarantined_task_stay_known_to_the_cutting_rule(tmp_path):
    # given a first task with class a that is quarantined, and a stop before the second is complete
    rule = CutRule(new_classes=1)
    items = [*records("raise", label="a"), *records("x", label="b", start=1), *records("y", label="a", start=2)]
    items += records("z", label="c", start=3)
    undisturbed = pipeline(tmp_path / "b", ListSource(items), rule=rule, quarantine=True).run()
    first = pipeline(tmp_path / "a", ListSource(items[:2]), rule=rule, quarantine=True, learn_at_end=False)
    assert first.run().seen == ("a",)
    first.commits.close()

    # when
    commit = pipeline(tmp_path / "a", ListSource(items), rule=rule, quarantine=True).run()

    # then the cuts are those of the undisturbed run
    assert commit.report == undisturbed.report
    assert [task.classes for task in commit.report.history] == [("b", "a"), ("c",)]


def test_a_state_folder_that_goes_away_stops_the_agent(tmp_path):
    agent = pipeline(tmp_path / "state", ListSource(records(*TEN)))
    (tmp_path / "state" / "commits").rename(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="cannot write the state folder"):
        agent.run()


def test_progress_and_commits_become_metrics(tmp_path):
    class Telling(InlineWorker):
        told = False

        def poll(self):
            if self._task is not None and not self.told:
                self.told = True
                return Progress("train", 1, epoch=1, epochs=2, loss=0.5)
            return super().poll()

    agent = pipeline(tmp_path, ListSource(records(*TEN)), Telling())
    agent.run()
    status = agent.metrics.status()
    assert status["commit"]["number"] == 4
    assert status["stream"]["records"] == 10


def test_the_commit_records_the_configuration(tmp_path):
    agent = pipeline(tmp_path, ListSource(records(*TEN)))
    agent.config = {"task": {"samples": 3}}
    assert json.loads((agent.run().path / "manifest.json").read_text())["config"] == {"task": {"samples": 3}}


def test_a_locked_folder_is_not_taken_twice(tmp_path):
    agent = pipeline(tmp_path, ListSource([]))
    with pytest.raises(StateError, match="in use by another agent"):
        CommitStore(tmp_path, 3).lock()
    agent.commits.close()
