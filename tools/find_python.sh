#!/bin/sh
# Print the absolute path of a Python >= 3.12 that can make virtual environments; without one, say what to install.

# A candidate counts only if it runs: a pyenv shim may exist and still exit 127, Debian's python3 may lack ensurepip.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.version_info >= (3, 12) or sys.exit(1)' >/dev/null 2>&1
}

take() {
    "$1" -c 'import sys; print(sys.executable)'
    exit 0
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && take "$PYTHON"
    echo "find_python: PYTHON=$PYTHON is no Python >= 3.12 with venv and ensurepip; looking for another" >&2
fi

for candidate in python3.12 python3.13 python3.14 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python3; do
    usable "$candidate" && take "$candidate"
done

if command -v uv >/dev/null 2>&1; then
    candidate=$(uv python find --system '>=3.12' 2>/dev/null)
    [ -n "$candidate" ] && usable "$candidate" && take "$candidate"
    echo "find_python: no Python >= 3.12 found. Run: uv python install 3.12" >&2
    exit 1
fi

cat >&2 <<'TEXT'
find_python: no Python >= 3.12 with the modules venv and ensurepip was found. Install one, for example
  Debian, Ubuntu   apt-get install python3.12 python3.12-venv
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
  uv               uv python install 3.12
or name one: PYTHON=/path/to/python3.12 make ...
TEXT
exit 1
