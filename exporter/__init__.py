"""Carries results out: releases, metrics, HTTP; knows nothing of the stream client or the methods."""

import os

# onnxruntime since 1.29 reports its use to its makers from Linux too, unless this is set before it is loaded; whoever
# wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
