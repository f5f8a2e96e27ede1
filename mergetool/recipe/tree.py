"""A recipe's text as a tree of nodes, each of which knows its line and column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Scalar = bool | int | float | str
Path = tuple[str | int, ...]


@dataclass
class Node:
    """One value of the text: a scalar, a list of nodes or a mapping to nodes."""

    value: Scalar | list[Node] | dict[str, Node] | None
    place: str
    """Where the value stands; a block under a key stands where its key does."""
    key: str = ""
    """Where its key stands."""

    def plain(self) -> Any:
        """The value as plain lists, dictionaries and scalars."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, step: str | int) -> Node | None:
        """The node one step down, or None."""
        if isinstance(self.value, dict):
            return self.value.get(step) if isinstance(step, str) else None
        if isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            return self.value[step]
        return None

    def nearest(self, path: Path) -> Node:
        """The node at the path, or the last one on the way to it."""
        node = self
        for step in path:
            below = node.child(step)
            if below is None:
                return node
            node = below
        return node


def shorten(text: str, most: int = 60) -> str:
    """The text itself, or its beginning if it is long."""
    return text if len(text) <= most else text[: most - 1] + "…"
