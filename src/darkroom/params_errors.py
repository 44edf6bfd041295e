"""What is wrong with a value of `params.yaml`, in a line: key, value, what is allowed."""

import difflib
import reprlib
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

CHECKSUM = r"^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})$"
DIGEST = r"^[0-9a-f]{8,64}$"

_ALLOWED = {  # pydantic's error types, as the end of "expected …"
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "model_type": "a group of keys",
    "checksum": "sha256: or md5: and as many hexadecimal digits, or null",
    "digest": "a sha256 or its first 8 digits or more, in quotes",
    "string_pattern_mismatch": "letters, digits and _ . - only ({pattern})",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
}
_TYPES = {bool: "true or false", float: "a number", int: "a whole number", str: "a text", type(None): "null"}
_MAX_LINES = 20  # of mistakes; nobody reads more
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 3, 12, 6
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80
_FP16 = "fp16 overflows in attention and in the optimizer's second moment, so it is refused; use fp32 or bf16"


def shown(value: object) -> str:
    """A value as Python writes it, on one line, its middle left out where it is long."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to write it
        return "a number of thousands of digits"


def shortened(text: str) -> str:
    """Text of a file as part of a message: on one line, its end left out where it is long."""
    plain = "".join(character if character.isprintable() else "?" for character in text[:200])
    return plain + ("…" if len(text) > 200 else "")


def error_lines(details: list[ErrorDetails], root: type[BaseModel]) -> list[str]:
    """A line per mistake in a `root`; a misspelt key that explains a missing one is one mistake."""
    unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"][:_MAX_LINES]

    def explained(missing: ErrorDetails) -> bool:
        return missing["type"] == "missing" and any(
            location[:-1] == missing["loc"][:-1]
            and difflib.get_close_matches(str(location[-1]), [str(missing["loc"][-1])])
            for location in unknown
        )

    told = [detail for detail in details if not explained(detail)]
    more = [f"and {len(told) - _MAX_LINES} mistakes more"] if len(told) > _MAX_LINES else []
    return [_line(detail, root) for detail in told[:_MAX_LINES]] + more


def _line(detail: ErrorDetails, root: type[BaseModel]) -> str:
    location = [str(part) for part in detail["loc"]]
    context = detail.get("ctx", {})
    if detail["type"] == "combination":
        key = ".".join([*location, *context["key"].split(".")])
        return f"{key} = {shown(context['value'])}: {context['allowed']}"
    key = shortened(".".join(location))
    if detail["type"] == "extra_forbidden":
        known = keys_of(_group_at(location[:-1], root))
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"expected one of {', '.join(known)}"
        value = "" if isinstance(detail["input"], dict) else f" = {shown(detail['input'])}"
        return f"{key}{value}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{key}: missing; expected {_expected(location, root)}"
    value = shown(detail["input"])
    text = detail["input"] if isinstance(detail["input"], str) else value
    if location[-1] == "precision" and text.lower() in ("fp16", "float16", "half"):
        return f"{key} = {value}: {_FP16}"
    if detail["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(_field(location, root).annotation)]
        close = difflib.get_close_matches(text, choices, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        return f"{key} = {value}: expected {' or '.join(choices)}{hint}"
    kind = {CHECKSUM: "checksum", DIGEST: "digest"}.get(context.get("pattern", ""), detail["type"])
    return f"{key} = {value}: expected {_ALLOWED.get(kind, detail['msg']).format(**context)}"


def _group_at(location: list[str], root: type[BaseModel]) -> type[BaseModel]:
    group = root
    for name in location:
        group = _field([name], group).annotation  # type: ignore[assignment]
    return group


def _field(location: list[str], root: type[BaseModel]) -> FieldInfo:
    group = _group_at(location[:-1], root)
    return next(field for key, field in group.model_fields.items() if location[-1] in (key, field.alias))


def keys_of(group: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in group.model_fields.items()]


def _expected(location: list[str], root: type[BaseModel]) -> str:
    annotation = _field(location, root).annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a group with {', '.join(keys_of(annotation))}"
    return _kind(annotation)


def _kind(annotation: Any) -> str:
    """A type in the reader's words."""
    origin: Any = get_origin(annotation)
    choices = get_args(annotation)
    if origin is Annotated:
        return _kind(choices[0])
    if origin is Literal:
        return " or ".join(map(str, choices))
    if choices and origin is not list:
        return " or ".join(map(_kind, choices))
    return "a list" if origin is list else _TYPES.get(annotation, str(annotation))
