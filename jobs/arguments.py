"""Command lines from dataclasses: each field becomes a flag, and the docstring under it the flag's help."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from palindrome.pipeline.base.errors import SettingError

STORES = frozenset({"botocore", "aiobotocore", "aiohttp", "google", "gcsfs"})  # whose errors have no common base
C = TypeVar("C", bound="Options")


class ConfigError(ValueError):
    """A command that is wrong: one line that names the flag. Exit code 2."""


@dataclass(frozen=True)
class Range:
    """The values a number may take, both ends included; in `Annotated[int, Range(1)]`."""

    low: float
    high: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command takes. Making one checks each field's range and choices and raises ConfigError."""

    POSITIONAL: ClassVar[frozenset[str]] = frozenset()
    """Fields that are named by their place, not by a flag."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            if get_origin(kind) is not ClassVar:
                _check(name.upper() if name in self.POSITIONAL else flag_of(name), kind, getattr(self, name))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def config_error(flag: str, *only: type[Exception]) -> Iterator[None]:
    """Errors about what a flag names become a ConfigError that begins with the flag: those of the types in `only`, or
    those that files, stores and wrong values raise."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        of_a_store = type(e).__module__.split(".")[0] in STORES and not only
        if not of_a_store and not isinstance(e, only or (OSError, ValueError, ImportError)):
            raise
        at_fault = flag_of(e.field) if isinstance(e, SettingError) else flag
        raise ConfigError(f"{at_fault}: {' '.join(str(e).split()) or type(e).__name__}") from e


def add_arguments(parser: argparse.ArgumentParser, config: type[Options]) -> None:
    """One flag or place a field, with the field's docstring as its help."""
    docs = _docstrings(config)
    hints = get_type_hints(config, include_extras=True)
    required = parser.add_argument_group("required")
    for f in sorted(dataclasses.fields(config), key=lambda f: f.name == "address"):
        must = f.default is dataclasses.MISSING
        kind, choices, many = _shape(hints[f.name])
        text = docs[f.name].replace("%", "%%")
        if not must and f.default not in (None, (), False):
            shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            text += f" (default: {shown})"
        if f.name in config.POSITIONAL:
            parser.add_argument(f.name, help=text, metavar=f.name.upper(), nargs="+" if many else None)
            continue
        options: dict[str, Any] = {"dest": f.name, "help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            options |= {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
            options |= {"required": must} | ({"nargs": "+"} if many else {})
        (required if must else parser).add_argument(flag_of(f.name), **options)


def from_arguments(config: type[C], arguments: argparse.Namespace) -> C:
    given: dict[str, Any] = {
        f.name: getattr(arguments, f.name) for f in dataclasses.fields(config) if hasattr(arguments, f.name)
    }
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return config(**given)


def _shape(hint: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """A field's type as (scalar type, choices, whether it takes several)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _shape(args[0])
    if origin in (Union, types.UnionType):
        return _shape(next(a for a in args if a is not type(None)))
    if origin is tuple:
        return (*_shape(args[0])[:2], True)
    if origin is Literal:
        return str, args, False
    return hint, None, False


def _check(flag: str, hint: Any, value: Any) -> None:
    origin, args = get_origin(hint), get_args(hint)
    if value is None:
        return
    if value == "":
        raise ConfigError(f"{flag}: it is empty")
    if origin in (Union, types.UnionType):
        _check(flag, next(a for a in args if a is not type(None)), value)
    elif origin is tuple:
        for item in value:
            _check(flag, args[0], item)
    elif origin is Literal and value not in args:
        raise ConfigError(f"{flag}: {value!r} is none of {', '.join(args)}")
    elif origin is Annotated:
        for bound in args[1:]:
            if not bound.low <= value <= bound.high:
                upper = f" to {bound.high:g}" if bound.high != float("inf") else " or more"
                raise ConfigError(f"{flag}: {value} is out of range; it takes {bound.low:g}{upper}")


def _docstrings(config: type) -> dict[str, str]:
    """The string under each field, over the class and its bases."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")  # type: ignore
    return docs
