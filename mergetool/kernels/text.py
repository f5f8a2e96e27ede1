"""A coordinate text as a syntax tree: stripped to plain positional functions, loops over sources written out.

Kernels are compiled for a known number of sources, so ``for i in range(len(delta))`` and
``tuple(… for i in range(len(delta)))`` become straight lines that LLVM can vectorise.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from mergetool.kernels import language


class _Unroll(ast.NodeTransformer):
    """Writes out every loop over the sources."""

    def __init__(self, count: int) -> None:
        self.count = count

    def _over_sources(self, target: ast.expr, iterator: ast.expr) -> str | None:
        if isinstance(target, ast.Name) and ast.unparse(iterator).startswith("range(len("):
            return target.id
        return None

    def visit_For(self, node: ast.For) -> Any:
        index = self._over_sources(node.target, node.iter)
        self.generic_visit(node)
        if index is None:
            return node
        return [
            _Index(index, i).visit(ast.parse(ast.unparse(statement)).body[0])
            for i in range(self.count)
            for statement in node.body
        ]

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        made = node.args[0] if len(node.args) == 1 else None
        if not (isinstance(node.func, ast.Name) and node.func.id == "tuple" and isinstance(made, ast.GeneratorExp)):
            return node
        index = self._over_sources(made.generators[0].target, made.generators[0].iter)
        if index is None:
            return node
        text = ast.unparse(made.elt)
        items = [_Index(index, i).visit(ast.parse(text, mode="eval").body) for i in range(self.count)]
        return ast.Tuple(elts=items, ctx=ast.Load())

    def visit_Tuple(self, node: ast.Tuple) -> Any:
        """Flatten ``(*a, *b)``: a name that is starred is a tuple with one item for each source."""
        self.generic_visit(node)
        items: list[ast.expr] = []
        for item in node.elts:
            if isinstance(item, ast.Starred):
                name = ast.unparse(item.value)
                items += [ast.parse(f"{name}[{i}]", mode="eval").body for i in range(self.count)]
            else:
                items.append(item)
        node.elts = items
        return node


class _Index(ast.NodeTransformer):
    """Replaces the loop's index by a number."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.value) if node.id == self.name else node


def _tree(function: Callable[..., Any]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def plain(function: Callable[..., Any], count: int, keep: tuple[str, ...] | None = None) -> str:
    """The function's source for ``count`` sources: no decorator, docstring or annotation, arguments positional.

    Args:
        function: the text.
        count: the number of sources.
        keep: the keyword-only arguments to keep, in their order; all of them by default.
    """
    tree = _tree(function)
    tree.decorator_list = []
    tree.returns = None
    named = [a for a in tree.args.kwonlyargs if keep is None or a.arg in keep]
    tree.args = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(arg=a.arg) for a in [*tree.args.args, *named]],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=[],
    )
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return ast.unparse(ast.fix_missing_locations(_Unroll(count).visit(tree)))


def _names(code: CodeType) -> Iterator[str]:
    """Every name that code looks up, also inside its generator expressions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def called(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """What the function's text refers to outside itself: helper functions, deepest first, and constants."""
    assert isinstance(function, FunctionType)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if name in language.NAMES or value is None:
            continue
        if isinstance(value, FunctionType):
            yield from called(value)
            yield name, value
        elif isinstance(value, int | float):
            yield name, value


def keyword_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a text's parameters, in their order."""
    code = function.__code__
    return code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]


def positional_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a text's tensors, in their order."""
    return function.__code__.co_varnames[: function.__code__.co_argcount]
