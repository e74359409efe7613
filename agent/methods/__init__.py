"""The methods by name; each is a file of this folder, imported when it is chosen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.config import Method as Settings
    from agent.methods.base import Method
    from agent.model.clip import Clip

METHODS = {
    "bofa": "agent.methods.bofa:Bofa",
    "finetune": "agent.methods.finetune:Finetune",
    "gapstream": "agent.methods.gapstream:Gapstream",
    "mgclip": "agent.methods.mgclip:MgClip",
    "ncm": "agent.methods.ncm:Ncm",
    "ranpac": "agent.methods.ranpac:RanPac",
    "seca": "agent.methods.seca:Seca",
    "vrlwf": "agent.methods.vrlwf:VrLwf",
    "zeroshot": "agent.methods.zeroshot:ZeroShot",
}
"""The value of method.name -> "module:Class". A new method is a file, its section in agent/config/methods.py, and a
line here; every test of the contract runs over it then."""


def build(clip: Clip, settings: Settings) -> Method:
    """Build the configured method, which has learned nothing yet. Raises KeyError naming the known ones."""
    if settings.name not in METHODS:
        raise KeyError(f"method.name is {settings.name!r}; known methods: {', '.join(METHODS)}")
    module, _, name = METHODS[settings.name].partition(":")
    return getattr(importlib.import_module(module), name)(clip, settings)
