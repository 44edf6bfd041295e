"""YAML files as values, within bounds: a file that somebody else wrote costs no more than its size is worth."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_BYTES = 4 << 20  # of a file; `dvc.lock` grows with the number of outputs, not with their files
_MAX_DEPTH = 32  # levels
_MAX_VALUES = 200_000  # with every alias counted as all that it stands for


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML takes 2e-4 for a string), no key twice, no more levels and values than the bounds."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}  # id of a node -> values in it; none yet while it is read

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        mark, before = self.peek_event().start_mark, self._values  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"more than {_MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(None, None, "an alias of what it stands in", mark)
        self._values += self._sizes[id(node)] if alias else 1
        if self._values > _MAX_VALUES:
            raise yaml.MarkedYAMLError(None, None, f"more than {_MAX_VALUES} values, aliases counted", mark)
        if not alias:
            self._sizes[id(node)] = self._values - before
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As YAML's own; a value that Python does not have (a 13th month, a list as a key) is an error with a line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, OverflowError) as error:
            raise yaml.MarkedYAMLError(None, None, f"a value that cannot be read: {error}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: the last line resolves it
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # if not, the last line refuses it
                if key in seen:
                    raise yaml.MarkedYAMLError(None, None, f'key "{key}" appears twice', key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, max_bytes: int = MAX_BYTES) -> Any:
    """The values of a YAML file as DVC reads them. Raises yaml.YAMLError, for a file beyond the bounds as well."""
    if len(text) > max_bytes or len(text.encode(errors="replace")) > max_bytes:
        raise yaml.MarkedYAMLError(None, None, f"more than {max_bytes} bytes")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        mark = yaml.Mark("", error.position, line, 0, None, 0)
        raise yaml.MarkedYAMLError(None, None, f"character {error.character!r} is not allowed", mark) from None
