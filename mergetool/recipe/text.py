"""YAML to a tree of nodes, strictly and within bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from mergetool.errors import Problem, RecipeError
from mergetool.recipe.tree import Node, Scalar, shorten

MOST_NODES = 200_000
"""More values than this, aliases written out, and the text is refused."""
MOST_DEPTH = 40
"""Deeper nesting than this is refused."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Octal with a leading zero, and base sixty: only YAML 1.1 has them."""
_TEXT_TAGS = {_TAG + "str", _TAG + "timestamp", _TAG + "value", _TAG + "merge"}


def parse(text: str, name: str, place: str = "") -> tuple[Node | None, list[Problem]]:
    """Read one YAML document; a text that cannot be read at all gives no node.

    Args:
        text: the YAML.
        name: the file's name, for places.
        place: a place for every node, instead of the file, line and column.
    """

    def locate(line: int, column: int) -> str:
        return place or f"{name}:{line + 1}:{column + 1}"

    control = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if control:
        before = text[: control.start()].split("\n")
        what = f"the character {control.group()!a} is not allowed in YAML"
        return None, [Problem(what, locate(len(before) - 1, len(before[-1])), "remove it")]
    composer = _Composer(text, locate)
    try:
        return composer.document(), composer.problems
    except RecipeError as error:
        return None, [*composer.problems, *error.problems]
    except yaml.YAMLError as error:
        return None, [*composer.problems, _syntax(error, locate)]


def _syntax(error: yaml.YAMLError, locate: Callable[[int, int], str]) -> Problem:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).split("\n")[0]
    fix = ""
    if "'\\t'" in problem:
        fix = "indent with spaces, not with tabs"
    elif getattr(error, "context_mark", None):
        start = error.context_mark  # type: ignore[attr-defined]
        fix = f"{error.context} that begins at line {start.line + 1}"  # type: ignore[attr-defined]
    return Problem(f"not valid YAML: {problem}", locate(mark.line, mark.column) if mark else locate(0, 0), fix)


class _Composer:
    """Parser events to nodes. Own code, because PyYAML's composer drops keys and recurses without bound."""

    def __init__(self, text: str, locate: Callable[[int, int], str]) -> None:
        self.loader = _LOADER(text)
        self.locate = locate
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node] = {}
        self.count = 0

    def document(self) -> Node | None:
        loader = self.loader
        loader.get_event()  # the start of the stream
        if loader.check_event(yaml.StreamEndEvent):
            return None
        loader.get_event()  # the start of the document
        root = self.node(0)
        loader.get_event()  # its end
        if not loader.check_event(yaml.StreamEndEvent):
            self.refuse("a recipe is a single YAML document, and here begins a second", loader.peek_event())
        return root

    def place(self, event: Any) -> str:
        return self.locate(event.start_mark.line, event.start_mark.column)

    def refuse(self, what: str, event: Any) -> None:
        raise RecipeError(what, self.place(event))

    def grow(self, depth: int, place: str) -> None:
        self.count += 1
        if self.count > MOST_NODES:
            raise RecipeError(f"the text holds more than {MOST_NODES} values, aliases written out", place)
        if depth > MOST_DEPTH:
            raise RecipeError(f"the text is nested more than {MOST_DEPTH} levels deep", place)

    def node(self, depth: int) -> Node:
        event = self.loader.get_event()
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        self.grow(depth, self.place(event))
        node = Node(None, self.place(event))
        if isinstance(event, yaml.ScalarEvent):
            node.value = self.scalar(event)
        else:
            self.collection(node, event, depth)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def collection(self, node: Node, event: Any, depth: int) -> None:
        tag = event.tag
        if tag and tag not in (_TAG + "map", _TAG + "seq"):
            self.problems.append(_no_tag(tag, node.place))
        if isinstance(event, yaml.MappingStartEvent):
            node.value = self.mapping(depth)
            return
        items: list[Node] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self.node(depth + 1))
        self.loader.get_event()
        node.value = items

    def mapping(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        merged: list[Node] = []
        while not self.loader.check_event(yaml.MappingEndEvent):
            key = self.loader.peek_event()
            if not isinstance(key, yaml.ScalarEvent):
                self.refuse("a key must be plain text", key)
            self.loader.get_event()
            value = self.value(self.place(key), depth + 1)
            if key.value == "<<" and key.implicit[0]:
                merged += self.merged(value)
            elif key.value in entries:
                what = f"`{shorten(key.value)}` is set twice in the same mapping"
                self.problems.append(Problem(what, value.key, f"keep one; the first is at {entries[key.value].key}"))
            else:
                entries[key.value] = value
        self.loader.get_event()
        for node in merged:
            for name, value in node.value.items() if isinstance(node.value, dict) else ():
                entries.setdefault(name, value)
        return entries

    def value(self, key: str, depth: int) -> Node:
        """The node under a key; a block, or nothing at all, stands where the key does."""
        event = self.loader.peek_event()
        node = self.node(depth)
        node.key = key
        if getattr(event, "flow_style", None) is False or (node.value is None and not getattr(event, "value", "")):
            node.place = key
        return node

    def merged(self, node: Node) -> list[Node]:
        nodes = node.value if isinstance(node.value, list) else [node]
        for item in nodes:
            if not isinstance(item.value, dict):
                what = "`<<` merges mappings, and this is none"
                self.problems.append(Problem(what, item.place, "name the anchor of a mapping, such as `<<: *shared`"))
        return nodes

    def alias(self, event: Any, depth: int) -> Node:
        if event.anchor not in self.anchors:
            self.refuse(f"the alias `*{event.anchor}` has no anchor `&{event.anchor}` before it", event)
        copy = self.copy(self.anchors[event.anchor], depth)
        copy.place = self.place(event)
        return copy

    def copy(self, node: Node, depth: int) -> Node:
        self.grow(depth, node.place)
        value = node.value
        if isinstance(value, dict):
            value = {name: self.copy(below, depth + 1) for name, below in value.items()}
        elif isinstance(value, list):
            value = [self.copy(below, depth + 1) for below in value]
        return Node(value, node.place, node.key)

    def scalar(self, event: Any) -> Scalar | None:
        text: str = event.value
        tag = event.tag or self.loader.resolve(yaml.ScalarNode, text, event.implicit)
        if tag in _TEXT_TAGS or tag == "!":
            return text
        try:
            if _AMBIGUOUS.fullmatch(text) and tag in (_TAG + "int", _TAG + "float"):
                what = f"`{shorten(text)}` is one number in YAML 1.1 and another in YAML 1.2"
                self.problems.append(Problem(what, self.place(event), "write it in decimal digits, or quote a text"))
            return _scalar(tag, text)
        except _UnknownTagError:
            self.problems.append(_no_tag(tag, self.place(event)))
        except (ValueError, LookupError, OverflowError):
            what = f"{shorten(text)!r} cannot be read as {tag.removeprefix(_TAG)}"
            self.problems.append(Problem(what, self.place(event)))
        return text


class _UnknownTagError(LookupError):
    """A tag that recipes have no use for."""


def _scalar(tag: str, text: str) -> Scalar | None:
    node = yaml.ScalarNode(tag, text)
    kind = tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return _CONSTRUCTOR.construct_yaml_bool(node)
    if kind == "int":
        number = _CONSTRUCTOR.construct_yaml_int(node)
        if number.bit_length() > 512:  # printing a huge one would fail later
            raise ValueError
        return number
    if kind == "float":
        return _CONSTRUCTOR.construct_yaml_float(node)
    raise _UnknownTagError(tag)


def _no_tag(tag: str, place: str) -> Problem:
    return Problem(f"the tag `{shorten(tag)}` is not allowed", place, "write the value without a tag")
