# Make .venv and install mergetool into it, unless that was done for these versions before.
# Sourced by examples/quickstart.sh and tests/run.sh from the repository's root; $1 names extras, such as "[test]".

find_python() {
    for name in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return 0
        fi
    done
    echo "mergetool needs Python 3.11 or newer; install it, or set PYTHON to its name" >&2
    return 1
}

set_up() {
    python=$(find_python) || return 1
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "making .venv"
        rm -rf .venv
        "$python" -m venv .venv || return 1
    fi
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    for extras in "$1" "[test]"; do
        if [ "$(cat ".venv/installed$extras" 2>/dev/null)" = "$wanted" ]; then
            return 0
        fi
    done
    echo "installing mergetool$1 and what it needs into .venv (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$1" || return 1
    echo "$wanted" > ".venv/installed$1"
}
