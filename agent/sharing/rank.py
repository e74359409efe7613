"""What a rank other than the trainer does: it keeps the model in memory, and learns and scores its share of a task."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from agent import methods
from agent.config import Config
from agent.layout import SCRATCH
from agent.methods.base import InferenceModule, Method
from agent.model import ranks
from agent.model.clip import load_clip
from agent.model.images import load_tokens
from agent.scoring.answering import predicted
from agent.sharing import deal
from agent.sharing.machine import device_of, interface_of, use_interface
from agent.sharing.members import Connection, Gone
from agent.sharing.scores import ShareOfScoring
from exporter.decoders import Decoders

log = logging.getLogger(__name__)


class Rank:
    """It follows a trainer."""

    def __init__(self, config: Config, number: int, threads: int) -> None:
        """number: which of this machine's ranks it is. Raises SharingError, ModelError."""
        torch.set_num_threads(threads)
        self._config = config
        device = device_of(config, number)
        self._clip = load_clip(config.model.model_copy(update={"device": device}))
        self._decoders = Decoders(config.source.max_image_pixels, workers=threads)
        self._scoring = ShareOfScoring(self._clip, self._decoders, config.method.cache_bytes)
        self.device = str(self._clip.device)
        self.terms = deal.terms(config, self._clip)
        """What it must have in common with its trainer."""

    def follow(self, connection: Connection, host: str) -> None:
        """Learn every task until the trainer hangs up. What fails is told to the trainer, and raised."""
        while True:
            try:
                order = connection.receive(None)
            except Gone as error:
                log.info("the trainer has gone: %s", error)
                return
            started, waited = time.perf_counter(), ranks.waited_s()
            try:
                self._learn(connection, host, order)
            except Exception as error:
                failed = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                with suppress(Gone):
                    connection.send({"failed": failed})
                raise
            connection.send({"seconds": time.perf_counter() - started, "waited_s": ranks.waited_s() - waited})

    def _learn(self, connection: Connection, host: str, order: Mapping[str, Any]) -> None:
        """Take part in one update, step by step as agent.trainer takes it."""
        connection.send({"task": order["task"]})
        rank, size, port, timeout_s = order["rank"], order["size"], order["port"], order["timeout_s"]
        use_interface(str(order.get("interface") or interface_of(connection.here)))
        store = dist.TCPStore(host, port, size, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        with ranks.group(store, rank, size, timeout_s, self._clip.device):
            number, state, images = deal.take(self._clip.device)
            method = methods.build(self._clip, self._config.method)
            method.load_state(state)
            module = method.inference_module() if method.classes else None
            read = [partial(_encoded, image) for image in images]
            loaded = load_tokens(
                [read[at] for at in deal.share(len(read), rank)],
                self._clip,
                decoders=self._decoders,
                cache_bytes=self._config.method.cache_bytes,
                scratch=self._config.state.path / SCRATCH,
            )
            loaded = deal.joined(loaded, len(read), self._clip)
            self._help(connection, method, module)
            rows = deal.Rows.from_json(ranks.told())
            task = rows.data(number, loaded, read, self._clip, self._decoders)
            if len(task):
                predicted(self._clip, method, module, task, self._config.evaluation.batch_size, method.encode_names)
                method.update(task, lambda progress: None)
                module = method.inference_module()
            self._help(connection, method, module)

    def _help(self, connection: Connection, method: Method, module: InferenceModule | None) -> None:
        """Encode images for the trainer's scores until it goes on, for ever: it may have thousands to compare."""
        while not connection.receive(None).get("go on"):
            self._scoring.encode(method, module)


def _encoded(image: bytes | None) -> bytes:
    """Give an encoded image; of one that another rank has, a blank one that counts for nothing (see ranks.Part)."""
    return _BLANK if image is None else image


def _blank() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


_BLANK = _blank()
"""A small black picture."""
