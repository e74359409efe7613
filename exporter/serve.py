"""`gapstream serve`: answers images over HTTP with the release readers follow; onnxruntime alone, no torch.

Requests are read on the event loop, their images decoded in processes of their own (exporter.decoders) and their names
encoded on threads, and all images go through the model on one thread (exporter.batcher). So a request without names, or
with names that are known, does not wait for another's new ones.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from exporter.batcher import Batcher
from exporter.bodies import Bodies, Refused
from exporter.decoders import Busy, Decoders, DecodersError, TooManyPixels
from exporter.disconnects import unless_gone
from exporter.image_header import ImageError
from exporter.precision import FP32
from exporter.release import NoRelease, ReleaseError
from exporter.runtime import RETRY_S, Classifier, NamesError, Prediction, Prepared
from exporter.serving_metrics import ServeMetrics
from exporter.session import Device
from exporter.web import health, listen, web_server

log = logging.getLogger(__name__)

DRAIN_S = 8
"""Seconds that requests have to end after SIGTERM. The process must be gone before it is killed: after 10 s by `docker
stop`, after 15 s by the systemd unit."""

LOOP_SILENT_S = 30
"""Seconds without a turn of the event loop after which the process is not alive. It turns at least once a second unless
something blocks it, and nothing here should; with less, a machine that is short of CPU would lose its servers too."""

BEHIND_S = 60
"""Seconds since the last look that found the release that answers to be the current one, beyond which /readyz tells it.
A look is taken every second; opening a large release takes tens of them."""

FOLLOW_S = 1.0
"""Seconds between two looks for another release. A look reads a symlink or two; with a longer time the old release only
answers longer."""

_TOP = 5
"""Classes listed in an answer when the request does not say; the same as in `gapstream predict` and serve.kafka.top."""

_MAX_TOP_DIGITS = 9
"""Longest `top` that is read as a number: more classes than there are, and int() never sees a text of megabytes."""


_BOUNDARY_BYTES = 70
"""Longest boundary of a multipart body, by RFC 2046."""
_CLIENT_LEFT = 499
"""Status under which a request is counted whose client did not wait for the answer; the number is nginx's."""


class _FilesInMemory(MultiPartParser):
    """Bodies are in memory, where they are bounded; so are their files, and a full TMPDIR is no matter."""

    spool_max_size = 0  # SpooledTemporaryFile takes that for no limit


class Companion(Protocol):
    """Work that goes on beside a server and has a part in its health, see `Server.watch`."""

    def why_not_alive(self) -> list[str]:
        """Give the reasons why the process should be restarted; empty when all is well."""

    def why_not_ready(self) -> list[str]:
        """Give the reasons why it cannot do its work now; empty when it can."""


class Server:
    """This is the HTTP service of one state folder or release:

    POST /v1/classify?top=5   an image as the body, or several as multipart/form-data (top=0: all classes)
         &name=zebra&...      names to score beside the learned classes
    GET  /v1/labels           class names of the release that answers
    GET  /livez, /readyz      200, or 503 with reasons; ready once there is a release. /readyz also tells, under
                              `warnings`, when newer releases cannot be taken up
    GET  /metrics             Prometheus
    """

    def __init__(
        self,
        path: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        precision: str = FP32,
        device: Device = "auto",
        providers: Sequence[str] = (),
        threads: int = 0,
        max_batch: int = 64,
        max_images: int = 64,
        max_request_bytes: int = 32 * 2**20,
        max_bytes: int = 256 * 2**20,
        max_requests: int = 32,
        max_connections: int = 512,
        allowed_hosts: Sequence[str] = (),
        max_pixels: int = 50_000_000,
        max_names: int = 64,
        max_name_chars: int = 200,
    ) -> None:
        """Listen from here on; answer while `run` runs. The keyword arguments are the keys of [serve], and those of
        `Classifier`. Raises OSError when the address cannot be had."""
        self._open = lambda: Classifier(
            path,
            threads,
            device=device,
            providers=providers,
            precision=precision,
            max_batch=max_batch,
            max_pixels=max_pixels,
            max_names=max_names,
            max_name_chars=max_name_chars,
        )
        self._max_images = max_images
        self._bodies = Bodies(max_request_bytes, max_bytes)
        self._max_requests = max_requests
        self._requests = 0
        self.registry = CollectorRegistry()
        """What /metrics shows."""
        self._metrics = ServeMetrics(self.registry)
        self._classifier: Classifier | None = None
        self._companions: list[Companion] = []
        self._why_not = "the release is being opened"
        self._stopping = threading.Event()
        self._beat: float | None = None
        """When the event loop was last at work; None before `run`."""
        self._batcher = Batcher(self._classify, max_batch, self._metrics.batch.observe)
        self._decoders = Decoders(max_pixels)
        # A thread per request: those with new names wait for each other, and with fewer threads would hold up requests
        # whose names are known.
        self._namers = ThreadPoolExecutor(max_requests, "namer")
        routes = [
            Route("/v1/classify", self._on_classify, methods=["POST"]),
            Route("/v1/labels", self._on_labels),
            Route("/livez", self._on_live),
            Route("/readyz", self._on_ready),
            Route("/metrics", self._on_metrics),
        ]
        self._uvicorn = web_server(
            routes, host=host, allowed_hosts=allowed_hosts, max_connections=max_connections, drain_s=DRAIN_S
        )
        self._socket = listen(host, port, "serve")

    @property
    def port(self) -> int:
        """The port listened on, also where 0 was asked for."""
        return self._socket.getsockname()[1]

    @property
    def classifier(self) -> Classifier | None:
        """What answers; None while there is no release."""
        return self._classifier

    @property
    def stopping(self) -> bool:
        """True from `stop`, SIGTERM or SIGINT on."""
        return self._uvicorn.should_exit

    @property
    def answering(self) -> bool:
        """Whether `run` has begun to answer; there may be no release yet."""
        return self._beat is not None

    def why_not_alive(self) -> list[str]:
        """Reasons why the process should be restarted; empty when all is well. May be called from any thread.

        An event loop that is blocked cannot answer /livez; who asks here hears of it.
        """
        reasons = [] if self._batcher.alive else ["the thread that runs the model has died"]
        reasons += self._decoders.why_not_alive()
        silent = time.monotonic() - self._beat if self._beat is not None else 0
        if silent > LOOP_SILENT_S:
            reasons.append(f"the event loop was last seen {silent:.0f} s ago")
        reasons += self._classifier.why_not_alive() if self._classifier else []
        return reasons + [reason for companion in self._companions for reason in companion.why_not_alive()]

    def watch(self, companion: Companion) -> None:
        """Let /livez and /readyz speak for `companion` too, which works beside the server."""
        self._companions.append(companion)

    def run(self) -> None:
        """Answer until `stop`, SIGTERM or SIGINT; requests that have begun are answered first, within DRAIN_S."""
        # Opening a release takes seconds, and there may be none yet; /livez, /readyz and /metrics answer meanwhile.
        opener = threading.Thread(target=self._open_release, name="opener", daemon=True)
        opener.start()
        try:
            asyncio.run(self._serve())
        finally:
            self._stopping.set()
            opener.join()
            if self._classifier is not None:
                self._classifier.close()
            self._batcher.close()
            self._decoders.close()
            self._namers.shutdown()
            self._socket.close()

    async def _serve(self) -> None:
        async def turn() -> None:
            while True:
                await self._on_turn()
                await asyncio.sleep(1)

        turning = asyncio.create_task(turn())
        try:
            await self._uvicorn.serve(sockets=[self._socket])
        finally:
            turning.cancel()

    def stop(self) -> None:
        """Make `run` end, also one that has not begun yet. May be called from any thread."""
        self._uvicorn.should_exit = True

    def _open_release(self) -> None:
        """Open the release as soon as there is one; from then on its classifier takes up newer ones by itself."""
        wait_s = FOLLOW_S
        while not self._stopping.is_set():
            try:
                classifier = self._open()
            except Exception as error:  # nobody would start the thread again
                if str(error) != self._why_not:
                    log.warning("not ready: %s", error, exc_info=not isinstance(error, ReleaseError))
                self._why_not = str(error) or repr(error)
                # What is damaged is read whole at every attempt, and what is not there yet costs nothing.
                wait_s = FOLLOW_S if isinstance(error, NoRelease) else min(2 * wait_s, RETRY_S)
                self._stopping.wait(wait_s)
                continue
            classifier.follow(FOLLOW_S)
            log.info("release %s answers in %s on %s", classifier.release.id, classifier.precision, classifier.provider)
            self._classifier = classifier
            return

    def _ready(self) -> Classifier:
        if self._classifier is None:
            raise Refused(503, self._why_not)
        return self._classifier

    def _classify(self, images: Sequence[Prepared], top: int) -> list[Prediction]:
        return self._ready().classify(images, top)

    async def _on_classify(self, request: Request) -> Response:
        began = time.monotonic()
        try:
            response = await self._admitted(request)
        except (Refused, NamesError) as refused:
            status = refused.status if isinstance(refused, Refused) else 400
            # The request's body was not read to the end, so the connection cannot carry another request.
            headers = {"Connection": "close"} | ({"Retry-After": "1"} if status == 503 else {})
            response = JSONResponse({"error": str(refused)}, status, headers)
        except ClientDisconnect:  # nobody reads it; the metric counts it
            response = Response(status_code=_CLIENT_LEFT)
        except (ReleaseError, DecodersError) as error:
            response = JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        except Exception:
            log.exception("a request could not be answered; the next ones are")
            response = JSONResponse({"error": "internal error; see the log"}, 500)
        self._metrics.requests.labels(response.status_code).inc()
        self._metrics.seconds.observe(time.monotonic() - began)
        return response

    async def _admitted(self, request: Request) -> Response:
        """Read a request and answer it as one of at most `max_requests`. Raises what `_on_classify` makes a response
        of.
        """
        classifier = self._ready()
        self._check_place()  # so that no body is read for nothing
        top = request.query_params.get("top", str(_TOP))
        if not top.isdecimal() or len(top) > _MAX_TOP_DIGITS:
            raise Refused(400, f"got top={top}, expected how many classes to list, 0 for all")
        names = classifier.check_names(request.query_params.getlist("name"))
        async with self._bodies.body(request) as body:
            images = await self._images(request, body)
            # Only now: who is slow to send, or never ends, holds no place.
            self._check_place()
            self._requests += 1
            try:
                # Work of a client that has left is dropped: who waits for an answer does not wait for it.
                return await unless_gone(request, self._answer(classifier, images, names, int(top)))
            finally:
                self._requests -= 1

    def _check_place(self) -> None:
        if self._requests >= self._max_requests:
            raise Refused(503, f"{self._requests} requests are being worked on, no more are taken; come again")

    async def _answer(
        self, classifier: Classifier, images: Sequence[bytes], names: tuple[str, ...], top: int
    ) -> Response:
        """Prepare and classify the images of one request."""
        # The names go by themselves, once for all images: a decoder that waited for them would hold up others.
        preparing = self._prepare(classifier, images, names)
        if names:
            _, prepared = await asyncio.gather(self._encode_names(classifier, names), preparing)
        else:  # nearly all: without two tasks more for the event loop
            prepared = await preparing
        usable = [image for image in prepared if isinstance(image, Prepared)]
        self._metrics.images.labels("ok").inc(len(usable))
        self._metrics.images.labels("rejected").inc(len(prepared) - len(usable))
        # One image that cannot be used is an error in its place of the answer, not the end of the request.
        answers: Iterator[Prediction] = iter(())
        if usable:
            found = await asyncio.wrap_future(self._batcher.submit(usable, top))
            answers = iter(found)
        body: dict[str, Any] = {"release": None, "predictions": []}
        for image in prepared:
            if isinstance(image, ImageError):
                body["predictions"].append({"error": image.reason, "detail": image.detail})
            else:
                answer = next(answers)
                body["release"] = answer.release
                body["predictions"].append({"labels": answer.labels, "scores": answer.scores})
        return JSONResponse(body, 200 if usable else 422)

    async def _encode_names(self, classifier: Classifier, names: Sequence[str]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._namers, classifier.encode_names, names)

    async def _prepare(
        self, classifier: Classifier, images: Sequence[bytes], names: tuple[str, ...]
    ) -> list[Prepared | ImageError]:
        """Have the images of a request decoded, or say why one cannot be. Raises Refused, DecodersError."""
        preprocess = classifier.release.preprocess
        # Headers made to be slow take milliseconds each, which the event loop has not.
        checked = await asyncio.get_running_loop().run_in_executor(None, self._decoders.check, images)
        try:
            pixels = self._decoders.submit(checked, preprocess)
        except TooManyPixels as error:
            raise Refused(413, str(error)) from None
        except Busy as error:
            raise Refused(503, str(error)) from None
        found = await asyncio.gather(*map(asyncio.wrap_future, pixels), return_exceptions=True)
        prepared: list[Prepared | ImageError] = []
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, ImageError):
                raise one
            prepared.append(one if isinstance(one, ImageError) else Prepared(one, preprocess, names))
        return prepared

    async def _images(self, request: Request, body: bytes) -> list[bytes]:
        """Give the encoded images in the body of a request, at least one. Raises Refused."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data":
            if not body:
                raise Refused(400, "got nothing, expected an image as the body, or several as multipart/form-data")
            return [body]

        async def whole() -> AsyncGenerator[bytes, None]:
            yield body
            yield b""

        expected = f"expected one to {self._max_images} files, and nothing else"
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= _BOUNDARY_BYTES or set(boundary) & set(b'"\\'):
            raise Refused(400, f"got the boundary {boundary[:100]!r} of multipart/form-data; {expected}")
        # Without the client's charset: it would choose among all codecs of Python, for names that nobody looks at.
        headers = Headers({"content-type": f'multipart/form-data; boundary="{boundary.decode("latin-1")}"'})
        try:
            form = await _FilesInMemory(headers, whole(), max_files=self._max_images, max_fields=0).parse()
        except MultiPartException as error:
            raise Refused(400, f"{error.message}; {expected}") from None
        images = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
        await form.close()
        if not images:
            raise Refused(400, f"got no file, expected one to {self._max_images}")
        return images

    async def _on_labels(self, request: Request) -> Response:
        if self._classifier is None:
            return JSONResponse({"error": self._why_not}, 503, {"Retry-After": "1"})
        release = self._classifier.release
        return JSONResponse({"release": release.id, "created": release.created, "classes": release.classes})

    async def _on_turn(self) -> None:
        """Note that the event loop is at work; called once a second."""
        self._beat = time.monotonic()

    async def _on_live(self, request: Request) -> Response:
        return health(self.why_not_alive())

    async def _on_ready(self, request: Request) -> Response:
        reasons = [] if self._classifier is not None else [self._why_not]
        reasons += self.why_not_alive()
        reasons += [reason for companion in self._companions for reason in companion.why_not_ready()]
        # Only told: the release that answers goes on answering, and a bad one must not take every server out at once.
        classifier, warnings = self._classifier, []
        if classifier is not None and classifier.behind_s > BEHIND_S:
            why = classifier.why_behind or "a look for another one has not ended"
            warnings.append(
                f"release {classifier.release.id} was last found to be current {classifier.behind_s:.0f} s ago: {why}"
            )
        warnings += classifier.passed_over if classifier is not None else ()
        return health(reasons, warnings=warnings)

    async def _on_metrics(self, request: Request) -> Response:
        # What can be read off is set here, at the scrape, and costs the requests nothing.
        metrics = self._metrics
        metrics.in_flight.set(self._requests)
        if self._classifier is not None:
            release = self._classifier.release
            metrics.release.info(
                {
                    "id": release.id,
                    "classes": str(len(release.classes)),
                    "precision": self._classifier.precision,
                    "provider": self._classifier.provider,
                }
            )
            metrics.made.set(datetime.fromisoformat(release.created).timestamp())
            metrics.followed.set(time.time() - self._classifier.behind_s)
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"Content-Type": kind})
