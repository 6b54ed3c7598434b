"""Typed dotted overrides (`optimizer.learning_rate=1e-4`) and configurations as JSON."""

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from internvl_megatron.config.schema import ModelConfig, RunConfig
from internvl_megatron.errors import ConfigError

CONFIG_FILE = "config.json"
"""Name of a run's resolved configuration in its folder."""


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Replace fields named by their path; values are read by the field's type, `null` is None.

    Raises:
        ConfigError: no such field (with the nearest name), or a value of the wrong type.
    """
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r}: write it as section.field=value")
        config = _replaced(config, path.split("."), text, path)
    return config


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Replace fields of a configuration, or of a section of it, named by their path from there."""
    sections: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            sections.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    own |= {name: with_values(getattr(config, name), inner) for name, inner in sections.items()}
    return dataclasses.replace(config, **own)


def to_json(config: RunConfig) -> str:
    """The whole configuration, readable by `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)


def from_json(path: Path) -> RunConfig:
    """Read a configuration that `to_json` wrote.

    Raises:
        ConfigError: not JSON, unknown or missing fields, or values of the wrong type.
    """
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the folder of a run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    return _from_dict(RunConfig, raw, str(path))


def model_from_json(raw: Any, where: str) -> ModelConfig:
    """A model's sizes from parsed JSON; `where` names it in errors.

    Raises:
        ConfigError: unknown or missing fields, or values of the wrong type.
    """
    return _from_dict(ModelConfig, raw, where)


def changed_fields(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths of the fields in which two configurations differ."""
    changed = []
    for field in dataclasses.fields(old):
        before, after, name = getattr(old, field.name), getattr(new, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(before):
            changed += changed_fields(before, after, f"{name}.")
        elif before != after:
            changed.append(name)
    return changed


def field_paths(section: type = RunConfig, path: str = "") -> list[str]:
    """All fields an override can name."""
    names = []
    for name, hint in get_type_hints(section).items():
        names += field_paths(hint, f"{path}{name}.") if _is_section(hint) else [f"{path}{name}"]
    return names


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _replaced(section: Any, parts: list[str], text: str, path: str) -> Any:
    hints = get_type_hints(type(section))
    name, *rest = parts
    if name not in hints or (rest and not _is_section(hints[name])):
        near = difflib.get_close_matches(path, field_paths(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"override {path}={text}: there is no setting {path!r}; did you mean {near!r}?")
    if rest:
        return dataclasses.replace(section, **{name: _replaced(getattr(section, name), rest, text, path)})
    if _is_section(hints[name]):
        raise ConfigError(f"override {path}={text}: {path!r} is a section; name one of its fields, like {path}.NAME")
    return dataclasses.replace(section, **{name: _value(text, hints[name], path)})


def _value(text: str, hint: Any, path: str) -> Any:
    """A command-line text as the type a field declares."""
    options = _options(hint)
    if type(None) in options and text in ("null", "none", "None"):
        return None
    for option in options:
        if get_origin(option) is Literal and text in get_args(option):
            return text
        if get_origin(option) is tuple:
            items = [item.strip() for item in text.split(",")]
            if get_args(option)[0] is str:
                return tuple(items)
            if items and all(item.isdecimal() for item in items):
                return tuple(int(item) for item in items)
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is str:
            return text
    raise ConfigError(f"override {path}={text}: {text!r} is not {_describe(options)}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(options: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    parts = [
        f"one of {', '.join(get_args(option))}"
        if get_origin(option) is Literal
        else ("texts, like a=1,b=2" if get_args(option)[0] is str else "whole numbers, like 3,3,2")
        if get_origin(option) is tuple
        else names.get(option, str(option))
        for option in options
    ]
    return " or ".join(parts)


def _from_dict(section: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected an object, got {type(raw).__name__}")
    hints = get_type_hints(section)
    unknown = sorted(raw.keys() - hints.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; did you mean {near!r}?")
    values = {}
    for name, value in raw.items():
        hint = hints[name]
        inside = f"{where}: {name}"
        values[name] = _from_dict(hint, value, inside) if _is_section(hint) else _typed(value, hint, inside)
    try:
        return section(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    options = _options(hint)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is type(None) and value is None:
            return None
        if get_origin(option) is tuple and isinstance(value, list):
            items: list[Any] = value
            if all(type(item) is get_args(option)[0] for item in items):
                return tuple(items)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                break
        if option in (int, bool, str) and type(value) is option:
            return value
    raise ConfigError(f"{where}: {value!r} is not {_describe(options)}")
