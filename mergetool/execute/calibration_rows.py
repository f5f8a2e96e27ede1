"""Tables of samples: lines of JSON, Parquet files, data sets on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mergetool.errors import PlanError
from mergetool.execute.calibration_text import Encoder, Row, Spans, spread
from mergetool.publish.loadable import first_line
from mergetool.recipe.calibrated import on_hub
from mergetool.recipe.data import Data
from mergetool.recipe.spelling import did_you_mean

COLUMNS = (("text",), ("messages",), ("prompt", "response"))
"""What a row is looked through for, in this order, unless the recipe names a column."""
_EXTRA = "install them: `pip install 'mergetool[data]'`"


class Table(Protocol):
    """Rows that can be asked for one by one."""

    @property
    def names(self) -> Sequence[str]:
        """The columns; of rows that differ, those of the first."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Mapping[str, Any]:
        """What a row holds."""

    def place(self, index: int) -> str:
        """Where a row is, for messages."""


def chosen_rows(data: Data, file: Path | None, encoder: Encoder, seed: int) -> tuple[list[Row], tuple[str, ...]]:
    """Rows spread over a table, as tokens; and notes.

    A row without text, or cut off before anything that is to be predicted, gives way to the next of its run.

    Raises:
        PlanError: the table cannot be read, or its rows are not what they should be.
    """
    table = _open(data, file)
    columns = _columns(table, data)
    rows: list[Row] = []
    empty, unmarked = 0, False
    for run in spread(len(table), data.samples, seed):
        for index in run:
            text, spans, special = _sample(table, index, columns, encoder)
            row = encoder.row(text, spans, special)
            if row is not None:
                rows.append(row)
                unmarked |= encoder.labels and spans is None and not (special and len(columns) == 1)
                break
            empty += 1
    if not rows:
        fix = "name another `column`, or raise `max_length`"
        raise PlanError(f"none of {len(table)} rows holds anything to run on", data.path, fix)
    notes = []
    if empty:
        notes.append(f"{data.name}: {empty} rows passed over: empty, or cut off before their response")
    if unmarked:
        what = "it cannot be told which tokens are responses, so all of them are to be predicted"
        notes.append(f"{data.name}: {what}")
    return rows, tuple(notes)


def _columns(table: Table, data: Data) -> tuple[str, ...]:
    """The columns that make a sample."""
    names = table.names
    if data.column is not None:
        if data.column not in names:
            fix = did_you_mean(data.column, names)
            raise PlanError(f"there is no column `{data.column}`", table.place(0), fix)
        return (data.column,)
    for columns in COLUMNS:
        if set(columns) <= set(names):
            return columns
    there = ", ".join(f"`{name}`" for name in names) or "none"
    what = f"rows have neither `text` nor `messages` nor `prompt` and `response`; their columns are {there}"
    raise PlanError(what, table.place(0), f"name one under `data`: `{data.name}: {{path: …, column: …}}`")


def _sample(table: Table, index: int, columns: tuple[str, ...], encoder: Encoder) -> tuple[str, Spans, bool]:
    """The text of a row, what of it is to be predicted, and whether it gets special tokens."""
    row, place = table.row(index), table.place(index)
    absent = [name for name in columns if name not in row]
    if absent:
        there = ", ".join(f"`{name}`" for name in row) or "none"
        raise PlanError(f"the row has no `{absent[0]}`; its columns are {there}", place)
    values = [row[name] for name in columns]
    if len(values) == 1 and isinstance(values[0], Sequence) and not isinstance(values[0], str | bytes):
        if not values[0]:
            return "", None, False
        return *encoder.conversation(_messages(values[0], columns[0], place), place), False
    for name, value in zip(columns, values, strict=True):
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise PlanError(f"`{name}` must be text or a list of messages, not {kind}", place, "name another `column`")
    text = "".join(value or "" for value in values)
    responds = len(values) == 2 and encoder.labels and encoder.tells
    return text, [(len(values[0] or ""), len(text))] if responds else None, True


def _messages(value: Sequence[Any], name: str, place: str) -> list[Mapping[str, Any]]:
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            fix = 'write each as {"role": "user", "content": "…"}'
            raise PlanError(f"`{name}` must be messages with `role` and `content`", place, fix)
    return list(value)


def _open(data: Data, file: Path | None) -> Table:
    if file is None:
        return _from_hub(data)
    return _from_parquet(file) if data.format == "parquet" else Lines(file)


class Lines:
    """A file with a JSON object in each line; empty lines are passed over.

    Raises:
        PlanError: it cannot be read, is empty, or a line is no object.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._starts: list[tuple[int, int]] = []  # of each row the number of its line and where in the file it begins
        self.names: Sequence[str] = ()
        start = 0
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip(b" \t\r\n\xef\xbb\xbf"):
                        row = self._parsed(line, number)
                        self.names = self.names or tuple(row)
                        self._starts.append((number, start))
                    start += len(line)
        except OSError as error:
            raise PlanError(f"cannot be read: {error.strerror or error}", str(file)) from None
        if not self._starts:
            raise PlanError("the file is empty", str(file))

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self._file}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
        except UnicodeDecodeError as error:
            raise PlanError(f"is not UTF-8 text: byte {error.start} of the line", where, "save it as UTF-8") from None
        except json.JSONDecodeError as error:
            what = f"is not JSON: {error.msg}"
            raise PlanError(what, f"{where}:{error.colno}", "write one JSON object a line") from None
        except RecursionError:
            raise PlanError("is not JSON that can be read: it is nested too deep", where) from None
        if not isinstance(row, dict):
            raise PlanError("the line holds no JSON object", where, 'write one a line, such as {"text": "…"}')
        return row

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Mapping[str, Any]:
        """The object in a line."""
        number, start = self._starts[index]
        with self._file.open("rb") as lines:
            lines.seek(start)
            return self._parsed(lines.readline(), number)

    def place(self, index: int) -> str:
        """The file and the line."""
        return f"{self._file}:{self._starts[index][0]}"


class Columns:
    """A table of the `datasets` or `pyarrow` library.

    Raises:
        PlanError: it has no rows.
    """

    def __init__(self, rows: Any, names: Sequence[str], count: int, label: str) -> None:
        self._rows, self._count, self._label = rows, count, label
        self.names = names
        if not count:
            raise PlanError("there are no rows in it", label)

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Mapping[str, Any]:
        """The cells of a row by their columns."""
        found: Mapping[str, Any] = self._rows(index)
        return found

    def place(self, index: int) -> str:
        """The table and the row, counted from 1."""
        return f"{self._label}: row {index + 1}"


def _from_parquet(file: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise PlanError("Parquet files need the libraries of the extra `data`", str(file), _EXTRA) from None
    try:
        table = parquet.read_table(file, memory_map=True)
    except (ArrowException, OSError) as error:
        raise PlanError(f"cannot be read as Parquet: {first_line(error)}", str(file)) from None
    return Columns(lambda i: table.slice(i, 1).to_pylist()[0], table.column_names, table.num_rows, str(file))


def _from_hub(data: Data) -> Columns:
    try:
        import datasets
    except ImportError:
        raise PlanError("data sets on the Hub need the libraries of the extra `data`", data.path, _EXTRA) from None
    parts = on_hub(data.path)
    assert parts is not None  # the recipe was read
    try:
        with _no_bars(datasets):
            found = datasets.load_dataset(
                parts["repo"], parts["config"], split=parts["split"], revision=parts["revision"]
            )
    except Exception as error:  # of the library, the Hub, the network or the files
        # The library says of a table that it cannot make that it cannot; what it is about is the cause.
        why = ": ".join(first_line(each) for each in (error, error.__cause__) if each is not None)
        raise PlanError(f"cannot be loaded: {why}", data.path, "check its name, split and revision") from error
    return Columns(found.__getitem__, found.column_names, len(found), data.path)


@contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
