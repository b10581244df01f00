"""Command lines from dataclasses: each field becomes a flag, and the docstring under it the flag's help."""

import argparse
import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from palindrome.pipeline.base.errors import RunError, SettingError
from palindrome.pipeline.base.text import error_message
from palindrome.pipeline.storage.folder import is_outage

# The groups of the help, in order. A field named here is in that group in every command; any other field is in the
# GROUP of the class that defines it. Fields without a default are in "required".
GROUPS = {
    "required": (),
    "input": ("keep", "limit", "relist"),
    "model": ("model", "precision", "compile", "allow_pickle", "class_column", "prompt_column", "num_classes"),
    "inversion": (),
    "scoring": (),
    "sampling": (),
    "watermark": (),
    "interpolation": (),
    "evaluation": (),
    "training": (),
    "checks": (),
    "output": ("dtype", "latents", "measure", "save_dtype", "shard_size", "vae_latent"),
    "failures": ("max_failed_shards", "max_reject_fraction", "retry_rejects", "stall"),
    "estimate": ("calibrate", "calibration", "dry_run"),
    "submission": (),
    "cluster": ("workers",),
    "storage and logging": (),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
STORE_CLIENTS = frozenset({"botocore", "aiobotocore", "aiohttp", "google", "gcsfs"})  # their errors share no base class
C = TypeVar("C", bound="Options")


class ConfigError(ValueError):
    """An invalid command: one line that begins with the flag at fault. Exit code 2."""


@dataclass(frozen=True)
class Range:
    """The allowed values of a number, bounds included: `Annotated[int, Range(1)]`."""

    low: float
    high: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command. The constructor checks each field's range and choices and raises ConfigError."""

    POSITIONAL: ClassVar[frozenset[str]] = frozenset()
    """Fields given by position, not by a flag."""
    GROUP: ClassVar[str] = "options"
    """The help group of the fields that the class itself defines, one of GROUPS."""
    EXAMPLES: ClassVar[str] = ""
    """Commands shown at the end of the help, one a line. Each must parse."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            if get_origin(kind) is not ClassVar:
                _check(name.upper() if name in self.POSITIONAL else flag_of(name), kind, getattr(self, name))


def flag_of(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # `class_` is --class


@contextmanager
def config_error(flag: str, *only: type[Exception]) -> Iterator[None]:
    """Converts errors of the types in `only` to a ConfigError that begins with the flag; by default, the errors that
    files, stores and invalid values raise. An outage says nothing of the value, and becomes a RunError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        from_store = type(e).__module__.split(".")[0] in STORE_CLIENTS and not only
        if not from_store and not isinstance(e, only or (OSError, ValueError, ImportError)):
            raise
        at_fault = flag_of(e.field) if isinstance(e, SettingError) else flag
        message = f"{at_fault}: {error_message(e)}"
        refused = any(getattr(error, "errno", None) == EACCES for error in (e, e.__cause__))  # wrong credentials, say
        raise (RunError if not (only or refused) and is_outage(e, None) else ConfigError)(message) from e


def add_arguments(parser: argparse.ArgumentParser, config: type[Options], *more: type[Options]) -> list[str]:
    """Adds the fields of `config` and `more` as arguments, in groups, with the description and the examples of
    `config`. Returns the flags that the help shows. `from_arguments` checks for required flags, not argparse, so that
    `--imagse` is reported as misspelt rather than `--images` as missing."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _wrapped(inspect.cleandoc(config.__doc__ or ""))
    if config.EXAMPLES:
        parser.epilog = "examples:\n" + textwrap.indent(inspect.cleandoc(config.EXAMPLES), "  ")
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    required_flags: list[str] = []  # for the usage
    positional: list[str] = []
    flags: list[str] = []
    for options in (config, *more):
        described = _described(options)
        hints = get_type_hints(options, include_extras=True)
        for f in sorted(dataclasses.fields(options), key=lambda f: f.name == "out"):  # the output comes last
            text, title = described[f.name]
            required = f.default is dataclasses.MISSING
            kind, choices, many = _shape(hints[f.name])
            flag = flag_of(f.name)
            add = groups.get("required" if required else GROUP_OF.get(f.name, title), parser).add_argument
            arguments: dict[str, Any] = {"help": text.replace("%", "%%") + _default(f)}
            if f.name in options.POSITIONAL:
                add(f.name, metavar=f.name.upper(), nargs="+" if many else None, **arguments)
                positional.append(f"-- {f.name.upper()} ..." if many else f.name.upper())
                continue
            arguments |= {"dest": f.name, "default": argparse.SUPPRESS}
            flags.append(flag)
            if kind is bool and f.default:
                add(flag, action=argparse.BooleanOptionalAction, **arguments)
                flags.append(flag_of(f"no_{f.name}"))
            elif kind is bool:
                add(flag, action="store_true", **arguments)
                hidden = arguments | {"help": argparse.SUPPRESS}  # scripts may use it
                add(flag_of(f"no_{f.name}"), action="store_false", **hidden)
            else:
                metavar = None if choices or kind is str else kind.__name__.upper()
                add(flag, type=kind, choices=choices, metavar=metavar, nargs="+" if many else None, **arguments)
                if required:
                    required_flags.append(f"{flag} {f.name.upper()}")
    parser.usage = " ".join(["%(prog)s", *required_flags, "[options]", *positional])
    return flags


def from_arguments(config: type[C], arguments: argparse.Namespace) -> C:
    """The config with the fields in `arguments`. Raises ConfigError if a required field is missing or one is
    invalid."""
    fields = dataclasses.fields(config)
    given: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in fields if hasattr(arguments, f.name)}
    missing = [flag_of(f.name) for f in fields if f.default is dataclasses.MISSING and f.name not in given]
    if missing:
        raise ConfigError(f"the following arguments are required: {', '.join(missing)}")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _default(field: dataclasses.Field[Any]) -> str:
    """The default value as the help shows it."""
    if field.default in (dataclasses.MISSING, None, ()) or field.default is False:  # 0 is shown
        return ""
    if field.default is True:
        return f" (default: {flag_of(field.name)})"
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f" (default: {shown})"


def _wrapped(text: str) -> str:
    """Paragraphs filled to the terminal's width."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in text.split("\n\n"))


def _shape(hint: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """A field's type as (scalar type, choices, whether it takes several values)."""
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
    """Raises ConfigError if the value is empty, not among the choices, or out of range."""
    origin, args = get_origin(hint), get_args(hint)
    if value is None:
        return
    if value == "":
        raise ConfigError(f"{flag}: must not be empty")
    if origin in (Union, types.UnionType):
        _check(flag, next(a for a in args if a is not type(None)), value)
    elif origin is tuple:
        for item in value:
            _check(flag, args[0], item)
    elif origin is Literal and value not in args:
        raise ConfigError(f"{flag}: must be one of {', '.join(args)}; got {value!r}")
    elif origin is Annotated:
        for bound in args[1:]:
            if not bound.low <= value <= bound.high:
                upper = f" to {bound.high:g}" if bound.high != float("inf") else " or more"
                raise ConfigError(f"{flag}: {value} is out of range; it takes {bound.low:g}{upper}")


def _described(config: type[Options]) -> dict[str, tuple[str, str]]:
    """By field: the docstring under it, and the GROUP of the class that defines it; of the class and its bases."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(config.__mro__):
        if not issubclass(cls, Options):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
                found[field.target.id] = text, cls.GROUP  # type: ignore
    return found
