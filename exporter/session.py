"""Model files opened by onnxruntime, on CUDA when usable."""

from __future__ import annotations

import contextlib
import ctypes
import io
from pathlib import Path
from typing import Any, Literal

import onnxruntime

Device = Literal["auto", "cpu", "cuda"]


def open_session(model: Path, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """`auto` and `cuda` are CUDA when usable, else the CPU; `threads` 0: all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings tell of optimisations that were not made
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu" and _cuda_usable():
        # TF32 would cost three digits; exhaustive search and doubling arenas cost start-up time and memory.
        cuda = {
            "device_id": 0,
            "use_tf32": 0,
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _cuda_usable() -> bool:
    """Whether onnxruntime was built for CUDA and a device answers. Asking the driver first keeps machines without one
    quiet: onnxruntime prints an error for every library it misses."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    return True
