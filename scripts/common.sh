# Sourced by the scripts beside it, never run: makes .venv with the project installed in it.
#
# Debian's bare python3 has no ensurepip, and an ordinary user cannot install it. Then pip comes as Debian's own package
# python3-pip-whl, fetched and verified by apt into the private cache (qmp_glue.debian), without root.

set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

fail() { # status, message
    echo "$(basename "$0"): $2" >&2
    exit "$1"
}

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail 3 "no Python 3.11 or newer: install python3 (Debian 12 and newer have it), or name one in PYTHON"
}

# Make an environment with a pip in it. What is half made gets no name that anything looks at.
make_venv() { # python, directory
    if "$1" -c 'import ensurepip' 2>/dev/null; then
        "$1" -m venv "$2"
        return
    fi
    echo "this python3 has no ensurepip: fetching Debian's pip instead"
    "$1" -m venv --without-pip "$2"
    mkdir "$2/debian-pip"
    "$1" -m qmp_glue.debian unpack --suite trixie --into "$2/debian-pip/files" python3-pip-whl ||
        fail 3 "pip cannot be had: install python3-venv and try again"
    wheel=$(echo "$2"/debian-pip/files/usr/share/python-wheels/pip-*.whl)
    "$2/bin/python" "$wheel/pip" install --quiet --disable-pip-version-check "$wheel"
    rm -r "$2/debian-pip"
}

# Install the project; with "dev", what tests and linters need as well. A stamp of what is installed makes the next run
# immediate.
install_project() { # run or dev
    python=$(find_python)
    want=$(cat pyproject.toml && "$python" -c 'import sys; print(sys.version, sys.prefix)' && echo "$root")
    for stamp in ".venv/installed-$1" .venv/installed-dev; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
            return
        fi
    done
    echo "installing the project into .venv"
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        rm -rf .venv
        make_venv "$python" .venv
    fi
    extra=""
    [ "$1" = run ] || extra="[$1]"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extra" ||
        fail 2 "pip could not install the project: its message is above"
    printf '%s\n' "$want" >".venv/installed-$1"
}
