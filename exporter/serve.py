"""`gapstream serve`: answers images over HTTP with the release readers follow; onnxruntime alone, no torch.

Requests are read on the event loop, their images decoded in processes of their own (exporter.decoders) and their names
encoded on threads, and all images go through the model on one thread (exporter.batcher). So a request without names, or
with names that are known, does not wait for another's new ones.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from exporter.batcher import Batcher
from exporter.decoders import Busy, Decoders, DecodersError, TooManyPixels
from exporter.disconnects import unless_gone
from exporter.image_header import ImageError
from exporter.precision import FP32
from exporter.release import ReleaseError
from exporter.runtime import Classifier, NamesError, Prediction, Prepared
from exporter.serving_metrics import ServeMetrics
from exporter.session import Device

log = logging.getLogger(__name__)

READ_S = 30
"""Seconds within which a request's body must be there. Chosen by hand: the largest request by default (32 MiB) at 10
Mbit/s. A client that is slower, or says nothing, would otherwise hold one of serve.max_requests places for ever."""

DRAIN_S = 8
"""Seconds that requests have to end after SIGTERM. The process must be gone before it is killed: after 10 s by `docker
stop`, after 15 s by the systemd unit."""

LOOP_SILENT_S = 30
"""Seconds without a turn of the event loop after which the process is not alive. It turns ten times a second unless
something blocks it, and nothing here should; with less, a machine that is short of CPU would lose its servers too."""

FOLLOW_S = 1.0
"""Seconds between two looks for another release. A look reads a symlink or two; with a longer time the old release only
answers longer."""

_TOP = 5
"""Classes listed in an answer when the request does not say; the same as in `gapstream predict` and serve.kafka.top."""

_MAX_TOP_DIGITS = 9
"""Longest `top` that is read as a number: more classes than there are, and int() never sees a text of megabytes."""


_CLIENT_LEFT = 499
"""Status under which a request is counted whose client did not wait for the answer; the number is nginx's."""


class Refused(Exception):
    """A request that is not answered; the message says why."""

    def __init__(self, status: int, why: str) -> None:
        """`status`: the HTTP status of the refusal."""
        super().__init__(why)
        self.status = status


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
    GET  /livez, /readyz      200, or 503 with reasons; ready once there is a release
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
        threads: int = 0,
        max_batch: int = 64,
        max_images: int = 64,
        max_request_bytes: int = 32 * 2**20,
        max_requests: int = 32,
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
            precision=precision,
            max_batch=max_batch,
            max_pixels=max_pixels,
            max_names=max_names,
            max_name_chars=max_name_chars,
        )
        self._max_images = max_images
        self._max_bytes = max_request_bytes
        self._max_requests = max_requests
        self._requests = 0
        self.registry = CollectorRegistry()
        """What /metrics shows."""
        self._metrics = ServeMetrics(self.registry)
        self._classifier: Classifier | None = None
        self._companion: Companion | None = None
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
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=routes),
                log_config=None,  # or uvicorn would set up logging anew
                access_log=False,  # nothing is logged per request: /metrics counts them
                server_header=False,
                proxy_headers=False,  # who asks is never looked at, so nobody's word is needed for it
                lifespan="off",  # Starlette has nothing to set up; what is open here is closed in `run`
                timeout_graceful_shutdown=DRAIN_S,
                callback_notify=self._on_turn,
                timeout_notify=1,
            )
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot serve on {host}:{port} ({error.strerror or error}); set serve.host and serve.port to a free "
                "address, or serve.port to 0 for any free port",
            ) from error
        # asyncio sets it only on sockets made with IPPROTO_TCP; without it an answer waits 40 ms for the client's ACK.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

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
        return reasons + (self._companion.why_not_alive() if self._companion else [])

    def watch(self, companion: Companion) -> None:
        """Let /livez and /readyz speak for `companion` too, which works beside the server."""
        self._companion = companion

    def run(self) -> None:
        """Answer until `stop`, SIGTERM or SIGINT; requests that have begun are answered first, within DRAIN_S."""
        # Opening a release takes seconds, and there may be none yet; /livez, /readyz and /metrics answer meanwhile.
        opener = threading.Thread(target=self._open_release, name="opener", daemon=True)
        opener.start()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._stopping.set()
            opener.join()
            if self._classifier is not None:
                self._classifier.close()
            self._batcher.close()
            self._decoders.close()
            self._namers.shutdown()
            self._socket.close()

    def stop(self) -> None:
        """Make `run` end, also one that has not begun yet. May be called from any thread."""
        self._uvicorn.should_exit = True

    def _open_release(self) -> None:
        """Open the release as soon as there is one; from then on its classifier takes up newer ones by itself."""
        while not self._stopping.is_set():
            try:
                classifier = self._open()
            except ReleaseError as error:
                if str(error) != self._why_not:
                    log.warning("not ready: %s", error)
                self._why_not = str(error)
                self._stopping.wait(FOLLOW_S)
                continue
            classifier.follow(FOLLOW_S)
            log.info("release %s answers on %s", classifier.release.id, classifier.provider)
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
            if self._requests >= self._max_requests:
                raise Refused(503, f"{self._requests} requests are being worked on, no more are taken; come again")
            self._requests += 1
            try:
                response = await self._answer(request)
            finally:
                self._requests -= 1
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

    async def _answer(self, request: Request) -> Response:
        """Read, prepare and classify the images of one request. Raises what `_on_classify` makes a response of."""
        classifier = self._ready()
        top = request.query_params.get("top", str(_TOP))
        if not top.isdecimal() or len(top) > _MAX_TOP_DIGITS:
            raise Refused(400, f"got top={top}, expected how many classes to list, 0 for all")
        names = classifier.check_names(request.query_params.getlist("name"))
        images = await self._images(request)
        # Work of a client that has left is dropped: who waits for an answer does not wait for it.
        return await unless_gone(request, self._answer_images(classifier, images, names, int(top)))

    async def _answer_images(
        self, classifier: Classifier, images: Sequence[bytes], names: tuple[str, ...], top: int
    ) -> Response:
        # The names go by themselves, once for all images: a decoder that waited for them would hold up others.
        _, prepared = await asyncio.gather(
            self._encode_names(classifier, names), self._prepare(classifier, images, names)
        )
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
        if names:
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

    async def _images(self, request: Request) -> list[bytes]:
        """Give the encoded images of a request, at least one. Raises Refused."""
        try:
            async with asyncio.timeout(READ_S):
                body = await self._body(request)
        except TimeoutError:
            raise Refused(408, f"the request was not complete after {READ_S} s") from None
        except ClientDisconnect:
            raise Refused(400, "the request ended before its body did") from None
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            if not body:
                raise Refused(400, "got nothing, expected an image as the body, or several as multipart/form-data")
            return [body]

        async def whole() -> AsyncGenerator[bytes, None]:
            yield body
            yield b""

        try:
            parser = MultiPartParser(request.headers, whole(), max_files=self._max_images, max_fields=0)
            form = await parser.parse()
        except (MultiPartException, KeyError) as error:
            why = getattr(error, "message", "") or f"{error} is missing"
            raise Refused(400, f"{why}; expected one to {self._max_images} files, and nothing else") from None
        images = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
        await form.close()
        if not images:
            raise Refused(400, f"got no file, expected one to {self._max_images}")
        return images

    async def _body(self, request: Request) -> bytes:
        """Give the whole body of at most `_max_bytes`; what a client announces may be a lie, so both are checked."""
        too_large = f"larger than the {self._max_bytes} bytes that are taken; send fewer or smaller images"
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise Refused(413, f"the request has {announced} bytes, {too_large}")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                raise Refused(413, f"the request is {too_large}")
        return bytes(body)

    async def _on_labels(self, request: Request) -> Response:
        if self._classifier is None:
            return JSONResponse({"error": self._why_not}, 503, {"Retry-After": "1"})
        release = self._classifier.release
        return JSONResponse({"release": release.id, "created": release.created, "classes": release.classes})

    async def _on_turn(self) -> None:
        """Note that the event loop is at work; uvicorn calls it once a second."""
        self._beat = time.monotonic()

    async def _on_live(self, request: Request) -> Response:
        return _health(self.why_not_alive())

    async def _on_ready(self, request: Request) -> Response:
        reasons = [] if self._classifier is not None else [self._why_not]
        return _health(reasons + (self._companion.why_not_ready() if self._companion else []))

    async def _on_metrics(self, request: Request) -> Response:
        # What can be read off is set here, at the scrape, and costs the requests nothing.
        metrics = self._metrics
        metrics.in_flight.set(self._requests)
        if self._classifier is not None:
            release = self._classifier.release
            metrics.release.info(
                {"id": release.id, "classes": str(len(release.classes)), "provider": self._classifier.provider}
            )
            metrics.made.set(datetime.fromisoformat(release.created).timestamp())
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"Content-Type": kind})


def _health(reasons: list[str]) -> Response:
    return JSONResponse({"status": "failing" if reasons else "ok", "reasons": reasons}, 503 if reasons else 200)
