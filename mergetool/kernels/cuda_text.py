"""A coordinate text as C++: the same plain functions that Numba compiles, for NVIDIA's runtime compiler.

Every number is a ``double`` and every tuple a ``Pack`` of them, so a text means what it means in Python: its arithmetic
is float64, and flags and whole numbers are exact in it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from math import isfinite
from types import FunctionType
from typing import Any

from mergetool.kernels import language
from mergetool.kernels.text import called, plain

_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_BINARY = {**_ARITHMETIC, ast.BitAnd: "&&", ast.BitOr: "||"}
_UNARY = {ast.USub: "-", ast.UAdd: "+", ast.Not: "!", ast.Invert: "!"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_BOOLEAN = {ast.And: "&&", ast.Or: "||"}
_WORDS = {**{name: name for name in language.NAMES}, "abs": "fabs"}
"""What a text may call, besides its helpers, and what that is called in C++."""


def functions(text: Callable[..., Any], count: int, keep: tuple[str, ...] | None = None) -> str:
    """C++ of a text and of all that it calls, the text itself under the name ``whole_text``.

    Args:
        text: the text.
        count: the number of sources.
        keep: its keyword-only arguments to keep, in their order; all of them by default.

    Raises:
        NotImplementedError: it is written in more of Python than a coordinate text may be.
    """
    parts = {}
    helpers = dict(called(text))
    bodies = (plain(helper, count) for helper in helpers.values() if isinstance(helper, FunctionType))
    if unknown := _calls(plain(text, count, keep), *bodies) - {*_WORDS, *helpers}:
        raise NotImplementedError(f"a coordinate text cannot call `{min(unknown)}`")
    for name, value in helpers.items():
        if isinstance(value, FunctionType):
            parts[name] = _function(plain(value, count), _named(name))
        else:
            parts[name] = f"__device__ const double {_named(name)} = {_number(value)};\n"
    return "\n".join([*parts.values(), _function(plain(text, count, keep), "whole_text")])


def _calls(*sources: str) -> set[str]:
    """The names of what texts call."""
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _function(source: str, name: str) -> str:
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    arguments = [_named(argument.arg) for argument in tree.args.args]
    lines = _Body(arguments).block(tree.body, "    ")
    kinds = ", ".join(f"class T{i}" for i in range(len(arguments)))
    given = ", ".join(f"T{i} {argument}" for i, argument in enumerate(arguments))
    return "\n".join([f"template <{kinds}>", f"__device__ inline auto {name}({given}) {{", *lines, "}", ""])


def _named(name: str) -> str:
    """A name in C++; of a text's own one that no word of C++ is."""
    return _WORDS.get(name, f"{name}_")


def _number(value: float) -> str:
    """A number in full; a whole one as a double too."""
    if not isfinite(value):
        raise NotImplementedError(f"a coordinate text cannot hold {value}")
    return repr(float(value))


class _Body:
    """The statements of a function, and what has been declared in it so far."""

    def __init__(self, declared: list[str]) -> None:
        self.declared = set(declared)

    def block(self, statements: list[ast.stmt], indent: str) -> list[str]:
        """Statements as lines."""
        return [line for statement in statements for line in self._statement(statement, indent)]

    def _statement(self, node: ast.stmt, indent: str) -> list[str]:
        if isinstance(node, ast.Return) and node.value is not None:
            return [f"{indent}return {expression(node.value)};"]
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            return [f"{indent}{self._place(node.targets[0], node.value)} = {expression(node.value)};"]
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and type(node.op) in _ARITHMETIC:
            return [f"{indent}{_named(node.target.id)} {_operator(node.op)}= {expression(node.value)};"]
        if isinstance(node, ast.If):
            return self._branches(node, indent)
        raise NotImplementedError(f"a coordinate text cannot say `{ast.unparse(node)}`")

    def _branches(self, node: ast.If, indent: str) -> list[str]:
        """An ``if``; what is named first in a branch is a number, and known behind it too."""
        named = [
            target
            for each in ast.walk(node)
            for target in (each.targets if isinstance(each, ast.Assign) else ())
            if isinstance(target, ast.Name) and _named(target.id) not in self.declared
        ]
        lines = [f"{indent}double {name} = 0.0;" for name in dict.fromkeys(_named(target.id) for target in named)]
        self.declared.update(_named(target.id) for target in named)
        lines += [f"{indent}if ({_condition(node.test)}) {{", *self.block(node.body, indent + "    ")]
        if node.orelse:
            lines += [f"{indent}}} else {{", *self.block(node.orelse, indent + "    ")]
        return [*lines, f"{indent}}}"]

    def _place(self, target: ast.Name, value: ast.expr) -> str:
        name = _named(target.id)
        if name in self.declared:
            return name
        self.declared.add(name)
        return f"{'double' if _flag(value) else 'auto'} {name}"


def _operator(op: ast.operator) -> str:
    if type(op) not in _BINARY:
        raise NotImplementedError(f"a coordinate text has no {type(op).__name__}")
    return _BINARY[type(op)]


def expression(node: ast.expr) -> str:
    """An expression in C++; everything in parentheses, so that it is computed in Python's order."""
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return _number(node.value)  # type: ignore[arg-type]
        case ast.Name():
            return _named(node.id)
        case ast.BinOp():
            return f"({expression(node.left)} {_operator(node.op)} {expression(node.right)})"
        case ast.UnaryOp():
            return f"({_UNARY[type(node.op)]}{expression(node.operand)})"
        case ast.BoolOp() if all(map(_flag, node.values)):
            return _condition(node)
        case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            told = (f"({expression(a)} {_COMPARE[type(op)]} {expression(b)})" for a, op, b in pairs)
            return f"({' && '.join(told)})"
        case ast.IfExp():
            return f"({_condition(node.test)} ? {expression(node.body)} : {expression(node.orelse)})"
        case ast.Subscript():
            return f"{expression(node.value)}[{_place(node.slice)}]"
        case ast.Tuple():
            return f"pack({', '.join(map(expression, node.elts))})"
        case ast.Call(func=ast.Name(), keywords=[]):
            return f"{_named(node.func.id)}({', '.join(map(expression, node.args))})"  # type: ignore[attr-defined]
    raise NotImplementedError(f"a coordinate text cannot say `{ast.unparse(node)}`")


def _condition(node: ast.expr) -> str:
    """What is only asked whether it holds; there ``and`` and ``or`` may join numbers, whose value nobody sees."""
    if isinstance(node, ast.BoolOp):
        return f"({f' {_BOOLEAN[type(node.op)]} '.join(map(_condition, node.values))})"
    return expression(node)


def _flag(node: ast.expr) -> bool:
    """Whether an expression is true or false, and no number."""
    if isinstance(node, ast.BoolOp):
        return all(map(_flag, node.values))
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def _place(node: ast.expr) -> int:
    """The number in a subscript, which loops that are written out leave as a sum of constants."""
    try:
        return int(eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}}))
    except (NameError, SyntaxError, TypeError):
        raise NotImplementedError(f"a coordinate text cannot look up `{ast.unparse(node)}`") from None
