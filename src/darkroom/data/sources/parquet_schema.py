"""Which columns of a Parquet schema hold the images and the labels, by the hub's metadata where there is any."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkroom.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA = b"huggingface"  # {"info": {"features": {"label": {"_type": "ClassLabel", "names": […]}, …}}}
_IMAGES = ("image", "img")
_LABELS = ("label", "fine_label")


@dataclass(frozen=True)
class Columns:
    """What is read."""

    image: str  # the column, or its member: "image.bytes"
    label: str | None  # None: unlabelled
    names: tuple[str, ...] | None  # of the classes; None: not known

    def __str__(self) -> str:
        return f"{self.image} and {self.label or 'no label'} of {len(self.names or ()) or 'unnamed'} classes"


def find_columns(schema: pa.Schema, path: Path) -> Columns:
    """The columns of a file's schema. Raises InputError, which names the file, when there are none or several."""
    features = _features(schema, path)
    label = _label_column(schema, features, path)
    return Columns(_image_column(schema, features, path), label, _names(features.get(label or "", {}), label, path))


def _features(schema: pa.Schema, path: Path) -> dict[str, dict[str, Any]]:
    """The hub's description by column; nothing for a file that was not made with its library."""
    content = (schema.metadata or {}).get(_METADATA)
    if content is None:
        return {}
    try:
        features = json.loads(content)["info"]["features"]
        described = {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        expected = '{"info": {"features": {…}}} in JSON'
        raise InputError(f"{path}: metadata {_METADATA.decode()} of the schema: expected {expected}") from None
    for name, feature in described.items():
        if feature.get("_type") in ("Image", "ClassLabel") and name not in schema.names:
            raise InputError(f"{path}: no column {name}, which its metadata describes, among {', '.join(schema.names)}")
    return described


def _image_column(schema: pa.Schema, features: dict[str, dict[str, Any]], path: Path) -> str:
    import pyarrow as pa

    found = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    found = found or [name for name in _IMAGES if name in schema.names]
    preferred = [name for name in _IMAGES if name in found]
    if not found or (len(found) > 1 and not preferred):
        problem = f"several columns of images, {', '.join(found)}" if found else "no column of images"
        raise InputError(f"{path}: {problem}; expected image or img among {', '.join(schema.names)}")
    name = (preferred or found)[0]
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and "bytes" in [member.name for member in kind]:
        member, kind = f"{name}.bytes", kind.field("bytes").type
    else:
        member = name
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(f"{path}: column {member} is {kind}; expected bytes, or a struct with a member bytes")
    return member


def _label_column(schema: pa.Schema, features: dict[str, dict[str, Any]], path: Path) -> str | None:
    import pyarrow as pa

    found = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    found = found or [name for name in _LABELS if name in schema.names]
    if not found:
        return None
    preferred = [name for name in _LABELS if name in found]
    if len(found) > 1 and not preferred:
        raise InputError(f"{path}: several columns of labels, {', '.join(found)}; expected one of them called label")
    name = (preferred or found)[0]
    kind = schema.field(name).type
    if not pa.types.is_integer(kind):
        raise InputError(
            f"{path}: column {name} is {kind}; expected whole numbers, with the classes' names in the schema"
        )
    return name


def _names(feature: dict[str, Any], label: str | None, path: Path) -> tuple[str, ...] | None:
    names = feature.get("names")
    if label is None or names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise InputError(f"{path}: column {label}: names of the schema: expected a list of different names")
    return tuple(names)
