"""Options of input kinds: "option=value" settings, parsed to the types of the kind's dataclass fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Union

from common.nearest import suggestion
from data_pipeline.errors import DataError

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# Type of a field -> its parser, and what a user should write.
_PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (lambda value: _BOOLEANS[value.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a text"),
}


def parse_settings(settings: Sequence[str], kinds: Mapping[str, type[Any]]) -> dict[str, dict[str, Any]]:
    """Return the values that settings give to the options of each kind.

    parse_settings(["dpi=72"], {"pdf": PdfDocuments, "text": TextFiles})  ->  {"pdf": {"dpi": 72}, "text": {}}

    Args:
        settings: "option=value" each. An option is set for every kind that has it.
        kinds: The dataclass of each kind.

    Raises:
        DataError: No kind has the option, it is given twice, or the value does not suit its type.
    """
    known = {kind: option_types(cls) for kind, cls in kinds.items()}
    options: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"--set {setting}: write option=value")
        takers = [kind for kind in kinds if name in known[kind]]
        if not takers:
            of_all = sorted({option for of_kind in known.values() for option in of_kind})
            hint = f"{suggestion(name, of_all)} (options are {', '.join(of_all) or 'none'})"
            named = f"kind {next(iter(kinds))}" if len(kinds) == 1 else f"kinds {', '.join(kinds)}"
            raise DataError(f"--set {name}: no such option of {named}{hint}")
        if name in options[takers[0]]:
            raise DataError(f"--set {name} is given twice: give it once, a list of values as {name}=A,B")
        for kind in takers:
            options[kind][name] = _parse(name, value, known[kind][name])
    return options


def option_types(kind: type[Any]) -> dict[str, Any]:
    """Return the type of each option of a kind: every field of the dataclass except `paths`."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.name != "paths"}


def _parse(name: str, value: str, wanted: Any) -> Any:
    """Return the value of an option in the type of its field."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if value not in arguments:
            raise DataError(f"--set {name}={value}: use one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        return tuple(_parse(name, part.strip(), arguments[0]) for part in value.split(",") if part.strip())
    if origin in (Union, types.UnionType):  # X | None
        return _parse(name, value, next(argument for argument in arguments if argument is not type(None)))
    parse, expected = _PARSERS[wanted]
    try:
        return parse(value)
    except (ValueError, KeyError) as error:
        raise DataError(f"--set {name}={value}: give {expected}") from error
