"""Reads the configuration once: a TOML file, GAPSTREAM_* variables, overrides. All mistakes are reported together.

A key `[task] samples` is `task.samples` in messages and GAPSTREAM_TASK__SAMPLES in the environment, which wins over
the file. Relative paths in a file are relative to that file.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    SecretStr,
    ValidationError,
)
from pydantic.fields import FieldInfo

from agent.config.base import MAYBE_PATH, explanations
from agent.config.sections import Config
from agent.errors import ConfigError
from exporter.masking import masked

ENV_PREFIX = "GAPSTREAM_"
"""A variable that begins so is a key; one that names no key is a mistake, as a mistyped one must not be passed over."""


def load(path: Path | None, env: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Config:
    """Read the configuration from a TOML file, over it GAPSTREAM_* variables, over them `overrides` (full key -> text).

    Without a file every key has its default. Text from `env` and `overrides` is read as the key's type; a list is
    written as in TOML or with commas. Raises ConfigError that lists every mistake.
    """
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        values = _read_toml(path, mistakes)
        _resolve_paths(values, Config, path.absolute().parent)
    for variable, text in sorted(env.items()):
        if variable.startswith(ENV_PREFIX):
            key = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _set(values, origins, key, text, variable, mistakes)
    for key, text in (overrides or {}).items():
        _set(values, origins, key, text, "--set", mistakes)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += _explain(error, origins)
    if mistakes:
        where = f" in {path}" if path else ""
        told = "\n  ".join([f"the configuration{where} has {len(mistakes)} mistake(s):", *mistakes])
        raise ConfigError(masked(told))
    return config


def resolved(config: Config) -> dict[str, Any]:
    """Give every key with its value, nested by section and JSON-able: what a commit records.

    Secrets are masked, also those inside URLs.
    """
    return _masked(config.model_dump(mode="json"))


def to_toml(config: Config, documented: bool = False) -> str:
    """Write `config` as a file that `load` reads back (but for masked secrets); `documented` explains each key."""
    lines: list[str] = []

    def write(section: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
        fields = section.model_fields
        explained = explanations(section) if documented else {}
        if prefix:
            lines.extend(["", *(_comment(section.__doc__) if documented else []), f"[{prefix}]"])
        for name, field in fields.items():
            if not _is_section(field):
                if documented:
                    lines.extend(_comment(explained[name], field))
                lines.append(f"{name} = {_toml_value(values[name])}")
        # After the keys, as whatever follows a [heading] in TOML belongs to it.
        for name, field in fields.items():
            if _is_section(field):
                write(_section(field), values[name], f"{prefix}.{name}".lstrip("."))

    if documented:
        lines += _comment(_EXAMPLE_HEAD)
    write(Config, resolved(config), "")
    return "\n".join(lines).lstrip("\n") + "\n"


_EXAMPLE_HEAD = """Every key of gapstream with its default. Delete what you do not change; run with

    gapstream run --config gapstream.toml

The environment wins over this file: GAPSTREAM_TASK__SAMPLES=100 sets samples of [task]. Relative paths are relative
to this file. All mistakes are reported at once; `gapstream config` prints what is in force."""
"""The example file begins with this text."""


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_masked(one) for one in value]
    return masked(value) if isinstance(value, str) else value


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _section(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return field.annotation


def _leaves(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """List full name and field of every key below `section`."""
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from _leaves(_section(field), f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _read_toml(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        mistakes.append(f"{path} cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        mistakes.append(f"{path} is not UTF-8: {error}")
    except tomllib.TOMLDecodeError as error:
        mistakes.append(f"{path} is not TOML: {error}")
    return {}  # so that mistakes in the environment are found in the same run


def _resolve_paths(values: dict[str, Any], section: type[BaseModel], base: Path) -> None:
    for name, field in section.model_fields.items():
        value = values.get(name)
        if _is_section(field):
            if isinstance(value, dict):
                _resolve_paths(value, _section(field), base)
        elif isinstance(value, str) and value not in _literals(field.annotation) and _names_a_file(field, value):
            values[name] = str(base / value)


def _names_a_file(field: FieldInfo, value: str) -> bool:
    """Tell whether a value from the file is a path, which is then relative to the file; the empty string is not."""
    if MAYBE_PATH in field.metadata:
        return Path(value).suffix in (".safetensors", ".pt", ".bin")
    return bool(value) and Path in (field.annotation, *get_args(field.annotation))


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in get_args(field.annotation)


def _literals(annotation: Any) -> tuple[Any, ...]:
    """Give the words a key may have, also where it may have others: `bundled` of `Literal["bundled"] | Path`."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _literals(part))


def _set(
    values: dict[str, Any], origins: dict[str, str], key: str, text: str, origin: str, mistakes: list[str]
) -> None:
    """Put the text of one variable or override where its key is."""
    field = dict(_leaves()).get(key)
    if field is None:  # said here, as validation would not know the variable's name
        mistakes.append(f"{key} ({origin}): there is no such key{_did_you_mean(key)}")
        return
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            return  # the file has a value where a section belongs, which is a mistake of its own
        values = inner
    origins[key] = origin
    values[name] = text
    if get_origin(field.annotation) is tuple:
        try:
            values[name] = tomllib.loads(f"list = {text}")["list"] if text.startswith("[") else _comma_separated(text)
        except tomllib.TOMLDecodeError:
            mistakes.append(f'{key} ({origin}): got {text}, expected a list as in TOML, like ["cat", "dog"]')
            values[name] = ()


def _comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _explain(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """Write one line for each key; a key of several types has one error for each of them."""
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        key, known = _full_name(detail["loc"])
        where = f"{key} ({origins[key]})" if key in origins else key
        if detail["type"] == "extra_forbidden" and not known:
            text = f"there is no such key{_did_you_mean(key)}"
        elif detail["type"] == "value_error":
            text = str(detail["ctx"]["error"])
        else:
            field = dict(_leaves()).get(key)
            # A value of a wrong type may be the secret itself, written without quotes.
            got = "a secret" if field and _is_secret(field) else repr(detail["input"])
            text = f"got {got}, expected: {detail['msg'].removeprefix('Input should be ')}"
        found.setdefault(where, []).append(text)
    lines = []
    for where, texts in found.items():
        first, *others = dict.fromkeys(texts)
        line = f"{where}: {first}" if where else first  # what several sections say together has no key of its own
        lines.append(line + "".join(f" or {other.partition('expected: ')[2]}" for other in others))
    return lines


def _full_name(location: tuple[int | str, ...]) -> tuple[str, bool]:
    """Name the key an error is about, without pydantic's marks for parts of a union, and whether it exists."""
    names: list[str] = []
    section: type[BaseModel] = Config
    for part in location:
        field = section.model_fields.get(str(part))
        names.append(str(part))
        if field is None:
            return ".".join(names), False
        if not _is_section(field):
            break
        section = _section(field)
    return ".".join(names), True


def _did_you_mean(key: str) -> str:
    keys = [name for name, _ in _leaves()]
    last = key.rpartition(".")[2]
    same_name = [name for name in keys if name.rpartition(".")[2] == last or name.replace(".", "_") == key]
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _comment(text: str | None, field: FieldInfo | None = None) -> list[str]:
    lines = [line.strip() for line in (text or "").strip().splitlines()]
    choices = _literals(field.annotation) if field else ()
    if len(choices) > 1 and not all(f"`{choice}`" in (text or "") for choice in choices):
        lines.append("One of: " + ", ".join(str(choice) or '""' for choice in choices))
    return [f"# {line}".rstrip() for line in lines]


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps("" if value is None else value, ensure_ascii=False)
