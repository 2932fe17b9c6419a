"""One typed config, four ways in: defaults, a YAML file, ``CLIPMILL_*`` variables, flags (later wins).

pydantic validates; this module only turns a model's fields into flags. (pydantic-settings takes no
``--pairs a b c``, which is what a shell's glob becomes, and reads the environment in workers too.)
"""

from __future__ import annotations

import argparse
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from schemas.errors import UsageError

PREFIX = "CLIPMILL_"
C = TypeVar("C", bound=BaseModel)


def load(cls: type[C], argv: Sequence[str], environ: Mapping[str, str], prog: str) -> tuple[C, bool]:
    """The config that ``argv`` asks for, and whether ``--json`` was given.

    Raises:
        UsageError: unknown or invalid flags, variables or YAML keys; the message names each.
        SystemExit: after ``--help`` (status 0).
    """
    args = vars(_parser(cls, prog).parse_intermixed_args(list(argv)))
    values: dict[str, Any] = {}
    if config := args.pop("config"):
        values = _read_yaml(config)
    as_json = bool(args.pop("json"))
    for path, _ in _fields(cls):
        variable = _variable(path)
        if variable in environ:
            _put(values, path, _from_text(cls, path, environ[variable]))
        dotted = ".".join(path)
        if dotted in args:
            _put(values, path, args[dotted])
    try:
        return cls.model_validate(values), as_json
    except ValidationError as exc:
        raise UsageError(
            f"{prog}: the config is not valid", actual=_explain(exc, cls), remedy=f"see {prog} --help"
        ) from exc


def check_environment(environ: Mapping[str, str], known: set[str]) -> None:
    """Raises UsageError for each variable of ours that no job reads: a slip of the pen would go unnoticed."""
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if not unknown:
        return
    lines = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        lines.append(name + (f", did you mean {near[0]}?" if near else ""))
    raise UsageError(
        "unknown environment variable", actual="; ".join(lines), remedy="unset it, or see clipmill JOB --help"
    )


def variables(cls: type[BaseModel]) -> set[str]:
    """Names of the environment variables that ``cls`` reads."""
    return {_variable(path) for path, _ in _fields(cls)}


def _variable(path: tuple[str, ...]) -> str:
    return PREFIX + "__".join(path).upper()


def _fields(cls: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in cls.model_fields.items():
        if nested := _model(field.annotation):
            yield from _fields(nested, (*prefix, name))
        else:
            yield (*prefix, name), field


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _arms(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [a for a in typing.get_args(annotation) if a is not type(None)]
    return [annotation]


def _is_sequence(field: FieldInfo) -> bool:
    return any(typing.get_origin(a) in (list, tuple) for a in _arms(field.annotation))


def _parser(cls: type[BaseModel], prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=(cls.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=None, metavar="FILE.yaml", help="read settings from this file")
    parser.add_argument("--json", action="store_true", default=False, help="last line of stdout: one JSON object")
    for path, field in _fields(cls):
        dotted = ".".join(path)
        flags = [f"--{dotted.replace('_', '-')}"] + ([f"-{dotted}"] if len(dotted) == 1 else [])
        shown = {"default": ""} if field.is_required() else {"default": _show(field)}
        text = f"{field.description or ''} {shown['default']}".strip().replace("%", "%%")
        if _arms(field.annotation) == [bool]:
            parser.add_argument(*flags, dest=dotted, action=argparse.BooleanOptionalAction, help=text)
        elif _is_sequence(field):
            parser.add_argument(*flags, dest=dotted, nargs="+", metavar=path[-1].upper(), help=text)
        else:
            parser.add_argument(*flags, dest=dotted, metavar=path[-1].upper(), help=text)
    if (name := getattr(cls, "argument", None)) is not None:
        parser.add_argument(name, nargs="?", metavar=name.upper(), help=f"the same as --{name}")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{self.prog}: {message}", remedy=f"see {self.prog} --help")


def _show(field: FieldInfo) -> str:
    if field.default_factory_takes_validated_data:
        return ""  # the description tells what it depends on
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined or default in ((), "", []):
        return ""
    if isinstance(default, (list, tuple)):
        default = ",".join(str(d) for d in default)
    return f"(default: {default})"


def _from_text(cls: type[BaseModel], path: tuple[str, ...], text: str) -> Any:
    field = dict(_fields(cls))[path]
    if _is_sequence(field):
        if not text.lstrip().startswith("["):
            return [t for t in text.split(",") if t]
        try:
            return json.loads(text)
        except json.JSONDecodeError as exc:
            raise UsageError(f"{_variable(path)} is no JSON list", expected='["a", "b"] or a,b', actual=text) from exc
    return text


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for i, name in enumerate(path[:-1], start=1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UsageError(f"{'.'.join(path[:i])} is not a mapping", actual=repr(values))
    values[path[-1]] = value


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise UsageError(f"cannot read the config file {file}", actual=str(exc)) from exc
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"the config file {file} is not a mapping", actual=type(loaded).__name__)
    return loaded


def _explain(exc: ValidationError, cls: type[BaseModel]) -> str:
    known = [".".join(path) for path, _ in _fields(cls)]
    lines = []
    for error in exc.errors():
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1)
            lines.append(f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        elif error["type"] == "missing":
            lines.append(f"--{key.replace('_', '-')} is required")
        else:
            lines.append(f"{key or 'config'}: {error['msg']} (given: {error['input']!r})")
    return "; ".join(lines)
