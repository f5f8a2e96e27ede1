"""Sizes, devices and parts as options: ``5GB``, ``512MiB``, ``cuda:1``, ``2/8``."""

from __future__ import annotations

import re
from decimal import Decimal

import click

_UNITS = {
    "": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)", re.ASCII)


def parse_size(text: str) -> int:
    """The bytes that a text such as ``5GB``, ``1.5 GiB`` or ``1000000`` means.

    Raises:
        ValueError: with a sentence that says how sizes are written.
    """
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 5GB, 512MiB or a number of bytes")
    nbytes = int(Decimal(found[1]) * _UNITS[found[2]])
    if nbytes <= 0:
        raise ValueError("a size must be positive")
    return nbytes


def size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """The callback of an option that is a size."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, option) from None


def device(context: click.Context, option: click.Parameter, value: str) -> str:
    """The callback of an option that is a device."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?(,cuda:\d{1,3})*", value):
        raise click.BadParameter(f"{value!r} is no device; write cpu, cuda, cuda:1 or cuda:0,cuda:1", context, option)
    return value


def part(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """The callback of an option that is one part of several."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, re.ASCII)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= parts:
        raise click.BadParameter(f"{value!r} is no part; write 1/8 for the first of eight", context, option)
    return number, parts
