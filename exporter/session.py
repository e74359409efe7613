"""Opens model files with onnxruntime, on CUDA where it is usable."""

from __future__ import annotations

import contextlib
import ctypes
import io
from pathlib import Path
from typing import Any, Literal

import onnxruntime

Device = Literal["auto", "cpu", "cuda"]
"""Where a model runs: `auto` is `cuda` when it is usable, else `cpu`."""

CUDA: dict[str, Any] = {
    "device_id": 0,
    "use_tf32": 0,
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}
"""Options of CUDA. TF32 would cost three digits, more than parity allows. The defaults of the last two, an exhaustive
search and arenas that double, cost start-up time and memory."""


def open_session(model: Path, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """Open a session for `model`: on CUDA when `device` is not `cpu` and CUDA is usable, else on the CPU.

    `threads`: CPU threads of one call, 0 for all cores. Raises what onnxruntime raises, whose errors share no public
    base class.
    """
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu" and cuda_usable():
        providers.insert(0, ("CUDAExecutionProvider", CUDA))
    return onnxruntime.InferenceSession(model, options_for(threads), providers=providers)


def options_for(threads: int) -> onnxruntime.SessionOptions:
    """Give the options of a session with this number of CPU threads, 0 for all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; its warnings tell of optimisations that were not made
    return options


def cuda_usable() -> bool:
    """Tell whether onnxruntime was built for CUDA and a device answers.

    The driver is asked first to keep machines without one quiet: onnxruntime prints an error for every library it
    misses.
    """
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    # A driver may be installed where no device is, as in a container that was given none.
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    # Loads CUDA and cuDNN from NVIDIA's wheels; without it only a system-wide installation would be found, unless torch
    # was imported first. It prints what it does not find.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    return True
