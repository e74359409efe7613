"""What can be set about an update that several processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from agent.config.base import Section, Unset

SECRET_CHARS = 16
"""A secret has at least this number of characters: chosen by hand, more than can be guessed over a network."""


def parted(address: str) -> tuple[str, int]:
    """Part an address into host, a name or an IPv4 address, and port. Raises ValueError."""
    host, _, port = address.partition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError(f"got {address!r}, expected HOST:PORT such as 10.0.0.5:29400")
    return host, int(port)


def _an_address(address: str) -> str:
    if address:
        parted(address)
    return address


class Training(Section):
    """Several processes (ranks) can share an update and its scoring, on this machine and on others: each computes with
    its part of the images, and the model is the same but for rounding. The network between machines must be private:
    images and model travel over it unencrypted."""

    processes: int = Field(1, ge=1)
    """This number of ranks is on this machine, the trainer counted: one for each CUDA device, or on a CPU each with its
    share of the cores. `gapstream join` starts as many on its machine. With 1 the trainer learns alone."""
    listen: Annotated[str, AfterValidator(_an_address)] = ""
    """At this address, HOST:PORT, the trainer waits for the ranks of `gapstream join`, which asks for a `secret_file`.
    Empty lets none join: ranks of this machine need no more than its own 127.0.0.1."""
    secret_file: Annotated[Path | None, Unset] = None
    """This file holds the secret that trainer and ranks prove to each other that they know (at least 16 characters);
    `gapstream join` needs the same."""
    ranks: int = Field(0, ge=0)
    """An update waits for this number of ranks, the trainer counted; with 0 it begins with those of this machine and
    whoever has joined by then."""
    join_s: float = Field(120, gt=0)
    """It waits for ranks at most this number of seconds."""
    fewer: bool = True
    """When they have passed, the update begins with the ranks that are there (true), or the attempt has failed (false).
    """
    timeout_s: float = Field(300, gt=0)
    """A rank for which another one has waited this number of seconds is lost. This ends the attempt, which begins anew
    from the commit. It should be less than `agent.trainer_silent_s`, and more than the slowest rank needs to decode its
    images."""

    @model_validator(mode="after")
    def _secret(self) -> Training:
        if self.listen and self.secret_file is None:
            raise ValueError(f"listen is {self.listen!r}, where anyone could join; expected a secret_file beside it")
        return self

    @property
    def shared(self) -> bool:
        """Whether there can be other ranks than the trainer."""
        return self.processes > 1 or bool(self.listen)
