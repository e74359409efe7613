"""Starts ranks of this machine as processes of their own, which end with the process that started them."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys

from agent.config import Agent, Config, ConfigError, Source, State, Training
from agent.config.training import SECRET_CHARS

EXIT_REFUSED = 3
"""A rank that may not join ends with this code: started again it would be refused again. Not one of the shell's."""


class RankProcess:
    """It is a rank in a process of its own."""

    def __init__(self, config: Config, address: tuple[str, int], secret: bytes, number: int, own: bool) -> None:
        """number: which of this machine's ranks it is, from 0; own: whether the trainer itself starts it."""
        needed = Config(
            model=config.model,
            method=config.method,
            training=Training(processes=config.training.processes),
            source=Source(max_image_pixels=config.source.max_image_pixels),
            state=State(path=config.state.path),
            agent=Agent(log_level=config.agent.log_level),
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agent.sharing.follow"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        # By its standard input, not its arguments, which every user of the machine can read. It stays open: its end
        # tells the rank that we are gone.
        assert self._process.stdin is not None
        order = {
            "config": needed.model_dump(mode="json"),
            "address": address,
            "secret": secret.hex(),
            "number": number,
            "own": own,
        }
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Give its exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def secret_of(config: Training) -> bytes:
    """Read the secret; without a file it is a new one, which only the processes know that are told it.

    Raises ConfigError.
    """
    if config.secret_file is None:
        return secrets.token_bytes(SECRET_CHARS)
    try:
        secret = config.secret_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"training.secret_file {config.secret_file} cannot be read: {error}") from error
    if len(secret) < SECRET_CHARS:
        raise ConfigError(
            f"training.secret_file {config.secret_file} has {len(secret)} characters, expected {SECRET_CHARS} or more, "
            "such as `openssl rand -hex 32` writes"
        )
    return secret.encode()
