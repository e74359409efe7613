"""`gapstream serve`: answers images over HTTP with the release readers follow; onnxruntime alone, no torch.

Requests are read and decoded side by side; whatever is ready when the model is free goes through it as one batch.
Names are encoded elsewhere: who asks for none, or for names that are known, does not wait for them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from exporter.preprocess import ImageError
from exporter.release import ReleaseError
from exporter.runtime import Classifier, Device, NamesError, Precision, Prediction, Prepared

log = logging.getLogger(__name__)

READ_S = 30
"""A request's body must be there within so long."""
DRAIN_S = 8
"""After SIGTERM requests have so long to end."""
FOLLOW_S = 1.0
_TOP = 5
_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
_IMAGES = [1, 2, 4, 8, 16, 32, 64, 128]


class ServeMetrics:
    """All metrics of one serving process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        common: dict[str, Any] = {"namespace": "gapstream_serve", "registry": registry}
        ProcessCollector(registry=registry)
        self.requests = Counter("requests", "Requests to classify, by HTTP status", ["code"], **common)
        self.images = Counter("images", "Images answered, or unusable", ["result"], **common)
        for result in ("ok", "rejected"):
            self.images.labels(result)
        self.seconds = Histogram("request_duration_seconds", "Seconds of a request", buckets=_SECONDS, **common)
        self.batch = Histogram("batch_images", "Images that went through the model at once", buckets=_IMAGES, **common)
        self.in_flight = Gauge("requests_in_flight", "Requests being worked on", **common)
        self.release = Info("release", "The release that answers", **common)
        self.made = Gauge("release_timestamp_seconds", "When the release that answers was made", **common)


class KafkaMetrics:
    """What a serving process that also answers topics has beside ServeMetrics. A message counts once its transaction is
    committed."""

    def __init__(self, registry: CollectorRegistry, reasons: Iterable[str]) -> None:
        """`reasons`: all there are for a message that cannot be answered."""
        common: dict[str, Any] = {"namespace": "gapstream_serve_kafka", "registry": registry}
        self.records = Counter("records", "Messages passed, marks included", ["topic"], **common)
        self.predictions = Counter("predictions", "Images of messages answered", **common)
        self.rejected = Counter("rejected_records", "Messages answered with an error", ["reason"], **common)
        self.lag = Gauge("lag_records", "Messages that wait, of the partitions held", ["topic", "partition"], **common)
        self.seconds = Histogram(
            "batch_duration_seconds", "Seconds from messages to committed predictions", buckets=_SECONDS, **common
        )
        self.transactions = Counter("transactions", "Transactions, by how they ended", ["result"], **common)
        for reason in reasons:
            self.rejected.labels(reason)
        for result in ("committed", "aborted"):
            self.transactions.labels(result)


class Refused(Exception):
    """A request that is not answered: HTTP status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Companion(Protocol):
    """Work beside a server, see `Server.watch`. Each gives its reasons, none when all is well."""

    def why_not_alive(self) -> list[str]: ...

    def why_not_ready(self) -> list[str]: ...


@dataclass(frozen=True)
class _Job:
    images: Sequence[Prepared]
    top: int
    answer: Future[list[Prediction]]


class Batcher:
    """Puts images of different requests through the model together. `submit` may be called from any thread."""

    def __init__(
        self,
        classify: Callable[[Sequence[Prepared], int], list[Prediction]],
        max_batch: int,
        observe: Callable[[int], None] = lambda images: None,
    ) -> None:
        """`classify`: images and the number of classes to list (0: all) -> a prediction for each, by one release."""
        self._classify = classify
        self._max_batch = max_batch
        self._observe = observe
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[Prepared], top: int) -> Future[list[Prediction]]:
        """The predictions for `images`, or what `classify` raised."""
        answer: Future[list[Prediction]] = Future()
        self._waiting.put(_Job(images, top, answer))
        return answer

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what was submitted, then end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            job = self._waiting.get()
            jobs: list[_Job] = []
            size = 0
            while job is not None:
                if job.answer.set_running_or_notify_cancel():
                    jobs.append(job)
                    size += len(job.images)
                if size >= self._max_batch:
                    break
                try:
                    job = self._waiting.get_nowait()
                except queue.Empty:
                    break
            else:
                ended = True
            if jobs:
                self._answer(jobs)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        images = [image for job in jobs for image in job.images]
        top = 0 if any(job.top == 0 for job in jobs) else max(job.top for job in jobs)
        self._observe(len(images))
        try:
            predictions = iter(self._classify(images, top))
            for job in jobs:
                own = [next(predictions) for _ in job.images]
                cut = job.top or None
                job.answer.set_result([Prediction(p.labels[:cut], p.scores[:cut], p.release) for p in own])
        except Exception as error:
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)


class Server:
    """The HTTP service of one state folder or release:

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
        precision: Precision = "fp32",
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
        """Listens from here on, answers while `run` runs. Raises OSError when the address cannot be had."""
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
        self._batcher = Batcher(self._classify, max_batch, self._metrics.batch.observe)
        self._decoders = ThreadPoolExecutor(os.cpu_count(), "decoder")
        # New names wait for each other; a thread for every request lets those that are known pass by.
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
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_graceful_shutdown=DRAIN_S,
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
        return self._socket.getsockname()[1]

    @property
    def classifier(self) -> Classifier | None:
        """What answers; None while there is no release."""
        return self._classifier

    @property
    def stopping(self) -> bool:
        """True from `stop`, SIGTERM or SIGINT on."""
        return self._uvicorn.should_exit

    def watch(self, companion: Companion) -> None:
        """/livez and /readyz speak for `companion` too, which works beside the server."""
        self._companion = companion

    def run(self) -> None:
        """Answer until `stop`, SIGTERM or SIGINT; requests that have begun are answered first."""
        opener = threading.Thread(target=self._follow, name="opener", daemon=True)
        opener.start()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._stopping.set()
            opener.join()
            if self._classifier is not None:
                self._classifier.close()
            self._batcher.close()
            self._decoders.shutdown()
            self._namers.shutdown()
            self._socket.close()

    def stop(self) -> None:
        self._uvicorn.should_exit = True

    def _follow(self) -> None:
        """Open the release as soon as there is one; from then on newer ones are taken up beside it."""
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
            # Its body was not read to the end, so the connection cannot carry another request.
            headers = {"Connection": "close"} | ({"Retry-After": "1"} if status == 503 else {})
            response = JSONResponse({"error": str(refused)}, status, headers)
        except ReleaseError as error:
            response = JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        except Exception:
            log.exception("a request could not be answered; the next ones are")
            response = JSONResponse({"error": "internal error; see the log"}, 500)
        self._metrics.requests.labels(response.status_code).inc()
        self._metrics.seconds.observe(time.monotonic() - began)
        return response

    async def _answer(self, request: Request) -> Response:
        classifier = self._ready()
        top = request.query_params.get("top", str(_TOP))
        if not top.isdecimal() or len(top) > 9:
            raise Refused(400, f"got top={top}, expected how many classes to list, 0 for all")
        names = classifier.check_names(request.query_params.getlist("name"))
        images = await self._images(request)
        _, *prepared = await asyncio.gather(
            self._encode_names(classifier, names), *(self._prepare(classifier, image, names) for image in images)
        )
        usable = [image for image in prepared if isinstance(image, Prepared)]
        self._metrics.images.labels("ok").inc(len(usable))
        self._metrics.images.labels("rejected").inc(len(prepared) - len(usable))
        answers: Iterator[Prediction] = iter(())
        if usable:
            found = await asyncio.wrap_future(self._batcher.submit(usable, int(top)))
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

    async def _prepare(self, classifier: Classifier, image: bytes, names: tuple[str, ...]) -> Prepared | ImageError:
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(self._decoders, classifier.prepare, image)
        except ImageError as error:
            return error
        return replace(prepared, extra=names)

    async def _images(self, request: Request) -> list[bytes]:
        """The encoded images of a request, at least one."""
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

    async def _on_live(self, request: Request) -> Response:
        reasons = [] if self._batcher.alive else ["the thread that runs the model has died"]
        return _health(reasons + (self._companion.why_not_alive() if self._companion else []))

    async def _on_ready(self, request: Request) -> Response:
        reasons = [] if self._classifier is not None else [self._why_not]
        return _health(reasons + (self._companion.why_not_ready() if self._companion else []))

    async def _on_metrics(self, request: Request) -> Response:
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
