"""Images are fetched from allowed places, whole and within bounds, and from nowhere else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from streams.claims import S3, ImageStore, check_prefix, signed
from streams.record import Reason, Unreachable, Unusable


class Images(BaseHTTPRequestHandler):
    """/ok.jpg, /big, /short (ends early), /moved (redirect), /busy (fails once), /down (fails always), /drops (a
    header without end, a line at a time), /away/... (fails always, as a whole); else nothing."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        name = self.path.rpartition("/")[2]
        first = sum(path == self.path for path, _ in self.seen) == 1
        if name == "drops":  # a header that never ends
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"X: y\r\n")
                    time.sleep(0.05)
        elif self.path.startswith("/away/"):
            self.send_error(503)
        elif name == "moved":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/")
            self.end_headers()
        elif name == "down" or (name == "busy" and first):
            self.send_error(503)
        elif name in ("ok.jpg", "busy", "big", "short"):
            body = bytes(5000) if name == "big" else b"image"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (name == "short")))
            self.end_headers()
            self.wfile.write(body)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Base URL, and what was asked for."""

    class Own(Images):
        seen: list[tuple[str, str | None]] = []  # noqa: RUF012

    http = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", Own.seen
    http.shutdown()
    http.server_close()


def reason(fetcher: ImageStore, url: str) -> Reason:
    with pytest.raises(Unusable) as why:
        fetcher.fetch(url)
    return why.value.reason


def test_an_allowed_image_is_fetched_and_a_busy_server_is_asked_again(server) -> None:
    base, seen = server
    waits: list[float] = []
    fetcher = ImageStore([f"{base}/a/"], 1000, sleep=waits.append)
    assert fetcher.fetch(f"{base}/a/ok.jpg") == b"image"
    assert fetcher.fetch(f"{base}/a/busy") == b"image"
    assert waits == [0.5] and len(seen) == 3


@pytest.mark.parametrize(
    ("name", "expected", "asked"),
    [
        ("none", Reason.FETCH_FAILED, 1),
        ("moved", Reason.FETCH_FAILED, 1),
        ("down", Reason.FETCH_FAILED, 4),  # the last asks whether the store answers at all
        ("short", Reason.FETCH_FAILED, 4),
        ("big", Reason.TOO_LARGE, 1),
    ],
)
def test_what_cannot_be_had_has_a_reason(name: str, expected: Reason, asked: int, server) -> None:
    base, seen = server
    assert reason(ImageStore([f"{base}/"], 1000, sleep=lambda s: None), f"{base}/{name}") == expected
    assert len(seen) == asked


@pytest.mark.parametrize(
    "rest",
    [
        "/b/ok.jpg",
        "/a",
        "/a/../b/ok.jpg",
        "/a/%2e%2e/b/ok.jpg",
        "/a/%2E./ok.jpg",
        "/a/..%2fb/ok.jpg",
        "/a/./ok.jpg",
        "/a/ok.jpg#x",
        "/a/..;/b/ok.jpg",
        "/a/..;x=1/b/ok.jpg",
        "/a/..%5cb/ok.jpg",
        "/a/..%3b/b/ok.jpg",
        "/a/%252e%252e/b/ok.jpg",
        "/a/..%252fb/ok.jpg",
        "/a/%25252e%25252e/b/ok.jpg",
        "/a/%2525252525252e/b/ok.jpg",
        "/a/%00ok.jpg",
        "/a/ok\\..\\x",
        "/a/o k.jpg",
        "/a/ok.jpg\r\nHost: x",
        "/a/\u00e9.jpg",
        "@evil.example.com/a/ok.jpg",
        ".evil.example.com/a/ok.jpg",
    ],
)
def test_nothing_outside_an_allowed_prefix_is_asked_for(rest: str, server) -> None:
    base, seen = server
    assert reason(ImageStore([f"{base}/a/"], 1000), base + rest) == Reason.FETCH_FORBIDDEN
    assert not seen


def test_names_with_signs_that_only_resemble_a_trick_are_fine(server) -> None:
    base, seen = server
    for name in ("a..b/ok.jpg", "100%25;1/ok.jpg", "...;/ok.jpg", "%41/ok.jpg"):
        assert ImageStore([f"{base}/a/"], 1000).fetch(f"{base}/a/{name}") == b"image"
    assert len(seen) == 4


def test_a_store_that_does_not_answer_at_all_says_nothing_of_the_image(server) -> None:
    # given a store that fails for every image and for its own prefix, and one that nobody listens at
    base, seen = server
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for place in (f"{base}/away/", f"{nobody}/"):
        with pytest.raises(Unreachable, match="does not answer at all"):
            ImageStore([place], 1000, sleep=lambda s: None).fetch(place + "ok.jpg")
    assert [path for path, _ in seen] == ["/away/ok.jpg"] * 3 + ["/away/"]


def test_a_header_that_never_ends_costs_one_time_out_an_attempt(server) -> None:
    base, _ = server
    began = time.monotonic()
    assert reason(ImageStore([f"{base}/"], 1000, 0.3, sleep=lambda s: None), f"{base}/drops") == Reason.FETCH_FAILED
    assert time.monotonic() - began < 4 * 0.3 + 1


def test_a_folder_that_is_not_there_is_a_store_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        ImageStore([f"file://{tmp_path}/disk/"], 5).fetch(f"file://{tmp_path}/disk/a.jpg")


def test_files_are_read_below_the_allowed_folder_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a b.jpg").write_bytes(b"image")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in/link").symlink_to(tmp_path / "secret")
    fetcher = ImageStore([f"file://{tmp_path}/in/"], 5)
    assert fetcher.fetch(f"file://{tmp_path}/in/a%20b.jpg") == b"image"
    assert reason(fetcher, f"file://{tmp_path}/in/link") == Reason.FETCH_FORBIDDEN
    assert reason(fetcher, f"file://{tmp_path}/secret") == Reason.FETCH_FORBIDDEN
    assert reason(fetcher, f"file://{tmp_path}/in/none") == Reason.FETCH_FAILED
    assert reason(fetcher, f"file://{tmp_path}/in/") == Reason.FETCH_FAILED
    assert reason(ImageStore([f"file://{tmp_path}/"], 5), f"file://{tmp_path}/secret") == Reason.TOO_LARGE


def test_s3_is_asked_at_its_endpoint_with_a_signature_when_there_are_keys(server) -> None:
    base, seen = server
    assert ImageStore(["s3://bucket/a/"], 9, s3=S3(base)).fetch("s3://bucket/a/ok.jpg") == b"image"
    assert ImageStore(["s3://bucket/"], 9, s3=S3(base, "eu", "id", "key")).fetch("s3://bucket/ok.jpg") == b"image"
    (first, nobody), (second, who) = seen
    assert (first, nobody, second) == ("/bucket/a/ok.jpg", None, "/bucket/ok.jpg")
    assert who and who.startswith("AWS4-HMAC-SHA256 Credential=id/") and "/eu/s3/aws4_request" in who
    assert "hidden" not in repr(S3(base, "eu", "id", "hidden"))


def test_the_signature_is_the_one_of_the_s3_documentation() -> None:
    # "Example: GET Bucket Lifecycle" of Amazon S3's "Signature Calculations for the Authorization Header"
    keys = S3(access_key="AKIAIOSFODNN7EXAMPLE", secret_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    url = urlsplit("https://examplebucket.s3.amazonaws.com/?lifecycle=")
    headers = signed(url, keys, datetime(2013, 5, 24, tzinfo=UTC))
    signature = "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
    assert headers["authorization"].endswith(f"Signature={signature}")


@pytest.mark.parametrize("prefix", ["", "/x/", "https://host", "ftp://host/", "https:///", "file://", "s3://bucket"])
def test_a_prefix_that_would_allow_too_much_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="expected https"):
        check_prefix(prefix)
