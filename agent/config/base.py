"""What every section of the configuration is made of."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
)


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every mistake with the key's full name."""


Unset = BeforeValidator(lambda value: None if value == "" else value)
"""For keys whose default is None, which TOML cannot say: the empty string does."""

MAYBE_PATH = "a path when it ends like a file"
"""Metadata of a text key that may name a file, which is then relative to the configuration's folder."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
