"""The HTTP service answers like the classifier, refuses what is too much, and never mixes or drops while it swaps."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agent.cli import main
from exporter import bodies, serve
from exporter.batcher import Batcher
from exporter.runtime import Classifier, NamesError, Prediction, Prepared
from exporter.serve import Server
from exporter.serving_metrics import ServeMetrics
from tests.bad_images import TOO_SLOW, slow_image
from tests.test_deploy import program
from tests.test_runtime import State, Toy, picture, png
from tests.test_text import Exports
from tests.tiny import tiny_clip

TOP = Path(__file__).parent.parent
HEAD_OF_TEN = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n"
"""The head of a request with a body of ten bytes."""
FOLLOWED = "gapstream_serve_release_current_timestamp_seconds"


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> State:
    """Commit 1 knows five classes, commit 2 seven; commit 2 is current."""
    state = State(tmp_path_factory.mktemp("state"))
    state.commit(Toy(5, seed=1))
    state.commit(Toy(7, seed=2))
    return state


@contextmanager
def serving(path: Path, **settings: Any) -> Iterator[Server]:
    server = Server(path, threads=1, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: ask(server, "/livez")[0] == 200)
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(state) -> Iterator[Server]:
    with serving(state.path, max_request_bytes=100_000, max_images=3) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        yield server


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within 60 s"
        time.sleep(0.01)


def ask(server: Server, path: str, body: bytes | None = None, kind: str = "image/png") -> tuple[int, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            status, text, found = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        status, text, found = error.code, error.read(), error.headers
    return status, json.loads(text) if found["Content-Type"] == "application/json" else text.decode()


def classify(server: Server, *images: bytes, query: str = "") -> tuple[int, Any]:
    if len(images) == 1:
        return ask(server, f"/v1/classify{query}", images[0])
    parts = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n"
        for image in images
    )
    return ask(server, f"/v1/classify{query}", parts + b"--xyz--\r\n", "multipart/form-data; boundary=xyz")


def test_an_image_is_answered_as_by_the_classifier(server, state):
    [expected] = Classifier(state.path).classify([png(picture(1))])

    status, answer = classify(server, png(picture(1)))

    assert status == 200 and answer["release"] == expected.release
    [got] = answer["predictions"]
    assert tuple(got["labels"]) == expected.labels
    assert got["scores"] == pytest.approx(expected.scores, abs=1e-5)


def test_several_images_are_answered_in_their_order_and_a_broken_one_in_its_place(server, state):
    images = [png(picture(1)), b"no image", png(picture(2))]

    status, answer = classify(server, *images, query="?top=0")

    assert status == 200
    first, broken, last = answer["predictions"]
    assert broken["error"] == "unsupported_format"
    for got, image in ((first, images[0]), (last, images[2])):
        [expected] = Classifier(state.path).classify([image], top=0)
        assert tuple(got["labels"]) == expected.labels and len(got["scores"]) == 7


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "said"),
    [
        ("/v1/classify", b"no image", "image/png", 422, None),
        ("/v1/classify", b"", "image/png", 400, "got nothing"),
        ("/v1/classify?top=-1", b"x", "image/png", 400, "top=-1"),
        ("/v1/classify", b"x" * 100_001, "image/png", 413, "100001 bytes, larger than the 100000"),
        ("/v1/classify", b"x", "multipart/form-data", 400, "expected one to 3 files"),
        ("/v1/classify", b"garbage", "multipart/form-data; boundary=xyz", 400, "expected one to 3"),
        ("/v1/classify", b"--xyz--\r\n", "multipart/form-data; boundary=xyz", 400, "got no file"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(path, body, kind, status, said, server):
    got, answer = ask(server, path, body, kind)
    assert got == status
    assert said is None or said in answer["error"]


def test_more_images_than_allowed_are_refused(server):
    status, answer = classify(server, *[png(picture(1))] * 4)
    assert status == 400 and "expected one to 3 files" in answer["error"]


def test_a_body_that_hides_its_size_is_cut_off(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/classify", iter([b"x" * 60_000] * 2), encode_chunked=True)
    assert connection.getresponse().status == 413


def test_an_answer_on_a_kept_connection_does_not_wait_for_an_acknowledgement(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    seconds = []
    for _ in range(20):
        began = time.monotonic()
        connection.request("POST", "/v1/classify", png(picture(1)))
        assert connection.getresponse().read()
        seconds.append(time.monotonic() - began)
    assert min(seconds[1:]) < 0.035


def test_a_client_that_never_sends_its_image_is_let_go(server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(HEAD_OF_TEN + b"abc")
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_many_who_never_end_their_request_stop_neither_probes_nor_requests(state):
    """1,100 of them took every file the process may open: nothing was answered, and the log grew by 3 MB a second."""
    with serving(state.path, max_connections=20, max_requests=1) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(60)]
        for number, client in enumerate(clients):
            client.sendall(HEAD_OF_TEN[:-2] if number % 2 else HEAD_OF_TEN + b"abc")

        assert [ask(server, path)[0] for path in ("/livez", "/readyz", "/metrics")] == [200] * 3
        assert classify(server, png(picture(1)))[0] == 200

        for client in clients:
            client.close()


@pytest.mark.parametrize("charset", ["no-such", "punycode", "idna", "hex", '"', "\xff"])
def test_a_charset_of_whatever_name_changes_nothing(charset, server):
    body = b'--x\r\nContent-Disposition: form-data; name="a\xff"; filename="b"\r\n\r\n'
    body += png(picture(1)) + b"\r\n--x--\r\n"
    assert ask(server, "/v1/classify", body, f"multipart/form-data; boundary=x; charset={charset}")[0] == 200


def test_files_of_a_request_need_no_disk(server, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: pytest.fail("a file was made"))
    monkeypatch.setattr(server._bodies, "_max_bytes", 2**23)
    noise = png(picture(1, 900, 900))
    assert len(noise) > 2**21
    assert classify(server, noise, png(picture(2)))[0] == 200


def test_no_redirect_repeats_the_host_that_a_client_named(server):
    assert ask(server, "/v1/labels/")[0] == 404


def test_a_page_whose_name_was_made_to_point_here_reads_nothing(state):
    with serving(state.path, allowed_hosts=["images.example.com"]) as server:
        for host, status in (("rebound.example", 403), ("images.example.com:9188", 200), ("127.0.0.1", 200)):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request("GET", "/livez", headers={"Host": host})
            assert connection.getresponse().status == status


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/v1/labels", "/v1/classify", "/nothing"])
def test_every_answer_says_once_what_it_is(path, server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path)
    assert [name.lower() for name, _ in connection.getresponse().getheaders()].count("content-type") == 1


def test_a_clock_that_is_set_back_does_not_make_the_event_loop_dead(server, monkeypatch):
    """uvicorn's own notification goes by the time of day: the watchdog would end a server that is well."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1e6)
    before = server._beat
    wait_for(lambda: server._beat > before)


@pytest.fixture(scope="module")
def naming(tmp_path_factory) -> Iterator[tuple[Server, Classifier]]:
    """A server of a release with a text part."""
    release = Exports(tiny_clip(), tmp_path_factory.mktemp("releases")).release()
    with serving(release.path, max_names=2, max_name_chars=20) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        yield server, Classifier(release.path, threads=1)


def test_extra_names_are_scored_for_one_image_and_for_several(naming):
    server, classifier = naming
    images = [png(picture(seed)) for seed in (1, 2)]
    expected = classifier.classify(images, top=0, extra=["zebra", "größer & <b>"])
    query = "?top=0&name=zebra&name=gr%C3%B6%C3%9Fer+%26+%3Cb%3E"
    answers = classify(server, images[0], query=query), classify(server, *images, query=query)
    for (status, answer), wanted in zip(answers, (expected[:1], expected), strict=True):
        assert status == 200
        for got, want in zip(answer["predictions"], wanted, strict=True):
            assert tuple(got["labels"]) == want.labels and got["scores"] == pytest.approx(want.scores, abs=1e-5)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?name=a&name=b&name=c", "got 3 extra names, expected at most 2"),
        ("?name=", "expected 1 to 20, not all blank"),
        ("?name=" + "x" * 21, "of 21 characters"),
    ],
)
def test_names_that_cannot_be_scored_are_refused_before_the_image_is_read(query, said, naming):
    status, answer = classify(naming[0], png(picture(1)), query=query)
    assert status == 400 and said in answer["error"]


def test_names_that_a_new_release_cannot_score_are_refused_also_when_it_came_in_between(naming, monkeypatch):
    def encode_names(names: Sequence[str]) -> None:
        raise NamesError("release 0123 scores only the classes it has learned")

    monkeypatch.setattr(naming[0].classifier, "encode_names", encode_names)
    status, answer = classify(naming[0], png(picture(1)), query="?name=zebra")
    assert status == 400 and "scores only the classes" in answer["error"]


def test_who_asks_for_no_new_names_does_not_wait_for_those_that_are_encoded(naming, monkeypatch):
    # given a name that is known, and as many requests with new ones, which are being encoded, as images can be decoded
    server, _ = naming
    image = png(picture(1))
    assert classify(server, image, query="?name=zebra")[0] == 200
    count = os.cpu_count() or 1
    begun, go = threading.Semaphore(0), threading.Event()

    class Encoding:
        def __enter__(self) -> None:
            begun.release()
            go.wait(20)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(server.classifier._served.names, "_encoding", Encoding())
    with ThreadPoolExecutor(count) as pool:
        slow = [pool.submit(classify, server, image, query=f"?name=new+{number}") for number in range(count)]
        assert all(begun.acquire(timeout=20) for _ in slow)
        try:
            # when others ask for none and for the one that is known, then they are answered
            assert classify(server, image)[0] == classify(server, image, query="?name=zebra")[0] == 200
            assert not any(one.done() for one in slow)
        finally:
            go.set()
        assert [one.result()[0] for one in slow] == [200] * count


def test_requests_with_and_without_names_go_through_the_model_together(naming):
    _, classifier = naming
    sizes: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def classify(images, top):
        if len(images) == 1:
            begun.set()
            go.wait(20)
        return classifier.classify(images, top)

    def prepared(seed: int, names: tuple[str, ...] = ()) -> Prepared:
        preprocess = classifier.release.preprocess
        return Prepared(preprocess(picture(seed)), preprocess, names)

    batcher = Batcher(classify, 8, sizes.append)
    batcher.submit([prepared(0)], 1)
    begun.wait(20)
    asked = [((), 1), (("zebra",), 2), (("okapi", "zebra"), 0)]
    waiting = [batcher.submit([prepared(1, names)], top) for names, top in asked]

    go.set()

    for (names, top), answer in zip(asked, waiting, strict=True):
        [want] = classifier.classify([picture(1)], top, names)
        assert answer.result(20)[0].labels == want.labels
    assert sizes == [1, 3]
    batcher.close()


def slow_images(count: int) -> list[bytes]:
    return [slow_image(666 - number) for number in range(count)]


def test_a_lone_image_does_not_wait_for_another_requests_many(state):
    with serving(state.path) as server, ThreadPoolExecutor(2) as pool:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        assert classify(server, png(picture(1)))[0] == 200
        many = [pool.submit(classify, server, *slow_images(6)) for _ in range(2)]
        wait_for(lambda: "gapstream_serve_requests_in_flight 2.0" in ask(server, "/metrics")[1])
        assert classify(server, png(picture(1)))[0] == 200
        assert not any(one.done() for one in many)
        server.stop()  # and nobody waits for the rest


def test_the_work_for_a_client_that_has_left_is_dropped(state):
    with serving(state.path) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        body = b"".join(b"--x\r\nContent-Disposition: form-data; name=a; filename=a\r\n\r\n" + image + b"\r\n"
                        for image in slow_images(6)) + b"--x--\r\n"  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(
                b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_for(lambda: server._decoders._images > 0)

        # the image at work is ended by itself, the others are never begun
        wait_for(lambda: server._decoders._images <= (os.cpu_count() or 1))
        wait_for(lambda: 'gapstream_serve_requests_total{code="499"} 1.0' in ask(server, "/metrics")[1])
        wait_for(lambda: server._decoders._images == 0)
        assert "gapstream_serve_images_total" in ask(server, "/metrics")[1]


def test_more_pixels_than_a_request_may_have_are_refused(state):
    with serving(state.path, max_pixels=300) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        image = png(picture(1, 15, 20))
        assert classify(server, *[image] * 4)[0] == 200
        status, answer = classify(server, *[image] * 5)
    assert status == 413 and "1500 pixels in all, at most 1200" in answer["error"]


def test_pixels_in_flight_are_bounded(state):
    with serving(state.path, max_pixels=700_000) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        decoders = server._decoders
        for _ in range(2):
            decoders.submit(decoders.check(slow_images(4)), server.classifier.release.preprocess)
        status, answer = classify(server, *slow_images(4))
        assert status == 503 and "come again" in answer["error"]


def test_a_provider_that_was_asked_for_and_does_not_answer_is_a_warning_and_the_one_that_does_a_label(state):
    with serving(state.path, providers=["openvino"], device="cpu") as server:
        wait_for(lambda: server.classifier is not None)
        status, told = ask(server, "/readyz")
        assert status == 200 and told["warnings"][0].startswith("openvino does not answer release ")
        assert 'provider="CPUExecutionProvider"' in ask(server, "/metrics")[1]


def test_an_image_that_outlasts_its_limits_is_answered_with_its_error(state, monkeypatch):
    monkeypatch.setattr("exporter.decoder.CPU_S", 0.1)
    monkeypatch.setattr("exporter.decoder.CPU_S_PER_PIXEL", 0.0)
    monkeypatch.setattr("exporter.decoder.WALL_TIMES", 100)  # whatever else the machine has to do
    with serving(state.path) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        status, answer = classify(server, png(picture(1)), slow_image(TOO_SLOW), png(picture(2)))
        assert status == 200
        first, bomb, last = answer["predictions"]
        assert bomb["error"] == "bomb" and "processor time" in bomb["detail"]
        assert first["labels"] and last["labels"]
        assert server.why_not_alive() == []


def test_a_decoder_that_is_stuck_is_a_reason_not_to_be_alive(state):
    with serving(state.path) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        classify(server, png(picture(1)))
        [decoder] = server._decoders._decoders
        decoder._due = time.monotonic() - 100
        assert any("a decoder has been stuck" in reason for reason in server.why_not_alive())
        assert ask(server, "/livez")[0] == 503
        decoder._due = None


def test_labels_are_those_of_the_release_that_answers(server, state):
    status, answer = ask(server, "/v1/labels")
    release = Classifier(state.path).release
    assert status == 200
    assert (answer["release"], answer["classes"]) == (release.id, list(release.classes))


def test_more_requests_than_allowed_are_told_to_come_again(state):
    with serving(state.path, max_requests=1) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        # given one that is being answered
        begun, go = threading.Event(), threading.Event()
        answering = server._batcher._classify

        def slowly(images, top):
            begun.set()
            go.wait(20)
            return answering(images, top)

        server._batcher._classify = slowly
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(classify, server, png(picture(1)))
            assert begun.wait(20)
            assert "gapstream_serve_requests_in_flight 1.0" in ask(server, "/metrics")[1]

            status, answer = classify(server, png(picture(1)))

            go.set()
            assert first.result()[0] == 200

        assert status == 503 and "come again" in answer["error"]
        # and when it has gone
        wait_for(lambda: classify(server, png(picture(1)))[0] == 200)


def test_it_is_alive_without_a_release_and_ready_as_soon_as_there_is_one(state, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "FOLLOW_S", 0.02)
    with serving(tmp_path / "state") as server:
        wait_for(lambda: "was a task learned yet?" in str(ask(server, "/readyz")))
        assert ask(server, "/readyz")[0] == ask(server, "/v1/labels")[0] == 503
        assert classify(server, png(picture(1)))[0] == 503

        (tmp_path / "state").symlink_to(state.path)

        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        assert classify(server, png(picture(1)))[0] == 200


def test_a_release_that_cannot_be_taken_up_is_told_and_leaves_the_server_ready(state, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "FOLLOW_S", 0.02)
    monkeypatch.setattr(serve, "BEHIND_S", 0.1)
    folder = tmp_path / "release"
    shutil.copytree(state.path / "commits" / "000001" / "release", folder)
    with serving(folder) as server:
        wait_for(lambda: ask(server, "/readyz") == (200, {"status": "ok", "reasons": []}))
        (folder / "release.json").write_text("[" * 100_000)

        wait_for(lambda: "warnings" in ask(server, "/readyz")[1])

        status, told = ask(server, "/readyz")
        assert status == 200 and "release.json cannot be read" in told["warnings"][0]
        assert classify(server, png(picture(1)))[0] == 200
        [shown] = [line for line in ask(server, "/metrics")[1].splitlines() if line.startswith(FOLLOWED)]
        assert 0 < time.time() - float(shown.split()[1]) < 300


def test_whatever_works_beside_the_server_speaks_in_both_probes(server):
    class Beside:
        dead, unready = ["a decoder hangs"], ["not joined yet"]

        def why_not_alive(self) -> list[str]:
            return self.dead

        def why_not_ready(self) -> list[str]:
            return self.unready

    pool = Beside()
    server.watch(pool)
    try:
        assert ask(server, "/livez") == (503, {"status": "failing", "reasons": ["a decoder hangs"]})
        assert ask(server, "/readyz")[1]["reasons"] == ["a decoder hangs", "not joined yet"]
    finally:
        pool.dead = pool.unready = []
    assert ask(server, "/readyz")[0] == ask(server, "/livez")[0] == 200


@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError(), OSError("disk")])
def test_no_exception_ends_the_search_for_a_first_release(error, state, monkeypatch):
    monkeypatch.setattr(serve, "FOLLOW_S", 0.02)
    opened, failures = Server._open_release, [error, error]

    def open_release(server: Server) -> None:
        whole = server._open

        def broken() -> Classifier:
            if failures:
                raise failures.pop()
            return whole()

        server._open = broken
        opened(server)

    monkeypatch.setattr(Server, "_open_release", open_release)
    with serving(state.path) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)


def test_swaps_under_load_neither_drop_nor_mix_an_answer(state, monkeypatch):
    monkeypatch.setattr(serve, "FOLLOW_S", 0.02)
    image = png(picture(3))
    expected, releases = {}, {}
    for number in (1, 2):
        [answer] = Classifier(state.path / "commits" / f"{number:06d}" / "release").classify([image], top=0)
        expected[answer.release] = answer
        releases[number] = answer.release
    done = threading.Event()
    answers: list[tuple[int, Any]] = []

    def client() -> None:
        while not done.is_set():
            answers.append(classify(server, image, image, query="?top=0"))

    def answered_by(number: int, since: int) -> bool:
        return any(answer.get("release") == releases[number] for _, answer in answers[since:])

    with serving(state.path) as server, ThreadPoolExecutor(4) as pool:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        assert classify(server, image)[0] == 200  # the decoders are there
        clients = [pool.submit(client) for _ in range(4)]
        try:
            for number in (1, 2, 1, 2):
                state.point(number)
                classes = {1: 5, 2: 7}[number]
                wait_for(lambda classes=classes: len(ask(server, "/v1/labels")[1]["classes"]) == classes)
                swapped = len(answers)
                wait_for(lambda number=number, swapped=swapped: answered_by(number, swapped))
        finally:
            done.set()
        for one in clients:
            one.result()

    assert {answer["release"] for _, answer in answers} == expected.keys()
    for status, answer in answers:
        assert status == 200
        for got in answer["predictions"]:
            assert tuple(got["labels"]) == expected[answer["release"]].labels
            assert got["scores"] == pytest.approx(expected[answer["release"]].scores, abs=1e-5)


def test_what_waits_goes_through_the_model_together_and_everyone_gets_their_own():
    sizes: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def classify(images, top):
        begun.set()
        go.wait(20)
        return [Prediction((image, "b", "c")[: top or None], (1.0, 0.0, 0.0)[: top or None], "r") for image in images]

    batcher = Batcher(classify, 4, sizes.append)
    # given one on its way through, and five behind it
    first = batcher.submit(["a"], 1)
    begun.wait(20)
    rest = [batcher.submit([name], top) for name, top in zip("bcdef", (1, 2, 0, 1, 1), strict=True)]

    go.set()

    assert [len(future.result(20)[0].labels) for future in (first, *rest)] == [1, 1, 2, 3, 1, 1]
    assert [future.result(20)[0].labels[0] for future in (first, *rest)] == list("abcdef")
    assert sizes == [1, 4, 1]
    batcher.close()


def test_a_model_that_fails_is_an_error_for_its_batch_and_the_next_one_is_answered():
    def classify(images, top):
        if images == ["bad"]:
            raise RuntimeError("out of memory")
        return [Prediction(("a",), (1.0,), "r") for _ in images]

    batcher = Batcher(classify, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        batcher.submit(["bad"], 1).result(20)
    assert batcher.submit(["good"], 1).result(20)[0].labels == ("a",)
    batcher.close()


def test_the_metrics_count_what_was_answered(state):
    with serving(state.path) as server:
        wait_for(lambda: ask(server, "/readyz")[0] == 200)
        classify(server, png(picture(1)), b"no image")
        classify(server, b"no image")

        metrics = ask(server, "/metrics")[1]

    for line in (
        'gapstream_serve_requests_total{code="200"} 1.0',
        'gapstream_serve_requests_total{code="422"} 1.0',
        'gapstream_serve_images_total{result="ok"} 1.0',
        'gapstream_serve_images_total{result="rejected"} 2.0',
        "gapstream_serve_batch_images_count 1.0",
    ):
        assert line in metrics
    assert (
        'classes="7"' in metrics
        and 'precision="fp32"' in metrics
        and "gapstream_serve_release_timestamp_seconds" in metrics
    )


def test_every_metric_is_in_the_readme():
    registry = CollectorRegistry()
    ServeMetrics(registry)
    readme = (TOP / "deploy/README.md").read_text(encoding="utf-8")
    for family in registry.collect():
        if family.name.startswith("gapstream_"):
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            assert f"| `{name}` | {family.type} |" in readme
            assert f"| {family.documentation} |" in readme


def test_a_taken_port_exits_with_a_clear_message(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--set", f"serve.port={taken.getsockname()[1]}"]) == 1
    assert "set serve.host and serve.port to a free address" in capsys.readouterr().err


def test_the_command_answers_without_torch_and_ends_well_on_sigterm(state, tmp_path):
    code = (
        "import sys; from agent.cli import main; "
        f"e = main(['serve', '--set', 'state.path={state.path}', '--set', 'serve.port=0', '--set', 'serve.threads=1']);"
        "print(*sorted({'torch', 'open_clip', 'streams.kafka.source'} & set(sys.modules)), e)"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        wait_for(lambda: "release " in (tmp_path / "log").read_text())
    finally:
        process.terminate()
    assert process.communicate(timeout=20)[0].split() == ["0"]
    assert process.returncode == 0


def test_the_unit_is_valid_and_its_command_exists(tmp_path):
    analyze = program("systemd-analyze", "systemd")
    command = tmp_path / "gapstream"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    unit = (TOP / "deploy/systemd/gapstream-serve.service").read_text(encoding="utf-8")
    assert "\nExecStart=/opt/gapstream/bin/gapstream serve --config " in unit
    (tmp_path / "gapstream-serve.service").write_text(unit.replace("/opt/gapstream/bin/gapstream", str(command)))
    done = subprocess.run(
        [analyze, "verify", "--man=no", tmp_path / "gapstream-serve.service"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "gapstream" in line]
    assert done.returncode == 0 and complaints == []
