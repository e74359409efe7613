"""What every section of the configuration is made of."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
)

Unset = BeforeValidator(lambda value: None if value == "" else value)
"""This makes the empty string mean None, for keys whose default is None: TOML has no word for it."""

MAYBE_PATH = "a path when it ends like a file"
"""This marks, as metadata, a text key that may name a file, which is then relative to the configuration's folder. A
`Path` key needs no mark; the words are never compared with anything but this constant."""


class Section(BaseModel):
    """A section is frozen, refuses unknown keys and checks its defaults too. The docstring below a key is what the
    example file says about it, see `explanations`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def explanations(section: type[BaseModel]) -> dict[str, str]:
    """Give what is said about each key of a section: its description, or else the docstring below it."""
    # Not pydantic's `use_attribute_docstrings`, which reads the source of every section at every start: 60 ms.
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, Section):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(definition, ast.ClassDef)
            for key, text in itertools.pairwise(definition.body):
                match key, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                        found[name] = inspect.cleandoc(words)
    described = {name: field.description for name, field in section.model_fields.items()}
    return found | {name: text for name, text in described.items() if text}


class SourceSection(Section):
    """A section below [source], whose name is a value of source.kind."""

    def missing(self) -> str:
        """Say what must be set before this kind of source can be used, as `key is ...; expected ...`; empty: nothing.

        It is asked only of the kind that is chosen: the others keep defaults that nobody filled in.
        """
        return ""
