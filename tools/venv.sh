#!/usr/bin/env bash
# Make a virtual environment with the pinned versions of constraints.txt: tools/venv.sh DIR
# Called by make. Takes the first of Python 3.11, 3.12, 3.13 that works; PYTHON=... chooses another.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

usable() { # a Python of the right version
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if usable "$PYTHON"; then echo "$PYTHON"; return; fi
        echo "error: PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13" >&2
        exit 2
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
    for candidate in "$HOME"/.pyenv/versions/3.1[1-3]*/bin/python3; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or name it with PYTHON=/path/to/python" >&2
    exit 2
}

if ! usable "$venv/bin/python"; then
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian splits venv off
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            echo "error: $python has no venv module: install the package python$version-venv" >&2
            exit 2
        fi
        apt-get update -qq && apt-get install -y -qq "python$version-venv"
    fi
    "$python" -m venv "$venv"
fi
echo "installing the versions of constraints.txt into $venv; this takes some minutes where they are missing"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[ray,gui,heic,test,demo]'
