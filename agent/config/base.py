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
"""This makes the empty string mean None, for keys whose default is None: TOML has no word for it."""

MAYBE_PATH = "a path when it ends like a file"
"""This marks, as metadata, a text key that may name a file, which is then relative to the configuration's folder. A
`Path` key needs no mark; the words are never compared with anything but this constant."""


class Section(BaseModel):
    """A section is frozen, refuses unknown keys, checks its defaults too, and takes the docstring below a key as what
    the example file says about it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class SourceSection(Section):
    """A section below [source], whose name is a value of source.kind."""

    def missing(self) -> str:
        """Say what must be set before this kind of source can be used, as `key is ...; expected ...`; empty: nothing.

        It is asked only of the kind that is chosen: the others keep defaults that nobody filled in.
        """
        return ""
