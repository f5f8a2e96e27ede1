#!/bin/sh
# Everything that must hold: format, lint, types, floors, generated docs, tests.
#   sh tests/run.sh          all but the slow tests
#   sh tests/run.sh --slow   the slow tests too: minutes, gigabytes, fetched inputs
#   sh tests/run.sh ARGS…    passes further arguments to pytest
set -eu
cd "$(dirname "$0")/.."
. tests/setup.sh
set_up "[test]"

selection="not slow"
if [ "${1:-}" = "--slow" ]; then
    selection="slow or not slow"
    shift
fi

bin=.venv/bin
echo "== format";  $bin/ruff format --check --quiet .
echo "== lint";    $bin/ruff check --quiet .
echo "== types";   $bin/mypy
echo "== floors";  $bin/lint-imports
echo "== docs";    $bin/python -m mergetool.reference --check
echo "== tests";   $bin/python -m pytest -q -m "$selection" "$@"
