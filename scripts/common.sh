# Sourced by the scripts beside it, never run: makes .venv with the project installed in it, and goes to the project's folder.
#
# Debian's bare python3 has no ensurepip, and an ordinary user cannot install it. Then pip comes as Debian's own package
# python3-pip-whl, fetched and verified by apt into the private cache (qmp_glue.debian), without root.
#
# Exit status: 2 set-up, 3 not on this machine.

set -eu
trap 'exit 130' INT # Also where sh is one that goes on after a child that took care of Ctrl-C itself.

here=$PWD
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$root"

half_made=.venv/half-made # There while .venv is worked on: left by Ctrl-C, a crash or a full disk.

fail() { # status, message
    echo "$(basename -- "$0"): $2" >&2
    exit "$1"
}

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail 3 "no Python 3.11 or newer: install python3 (Debian 12 and newer have it), or name one in PYTHON"
}

# Make an environment with a pip in it.
make_venv() { # python, directory
    if "$1" -c 'import ensurepip' 2>/dev/null; then
        "$1" -m venv "$2" || fail 2 "python cannot make $root/$2: its message is above"
        return
    fi
    echo "this python3 has no ensurepip: fetching Debian's pip instead"
    "$1" -m venv --without-pip "$2" || fail 2 "python cannot make $root/$2: its message is above"
    # The suite whose lists QEMU may need as well: they are the larger part of what is fetched here.
    "$1" -m qmp_glue.debian unpack --suite trixie-backports --into "$2/debian-pip" python3-pip-whl ||
        fail $? "no pip: put right what is named above, or install python3-venv, and try again"
    wheel=$(echo "$2"/debian-pip/usr/share/python-wheels/pip-*.whl)
    "$2/bin/python" "$wheel/pip" install --quiet --disable-pip-version-check --no-index "$wheel" ||
        fail 2 "Debian's pip cannot be installed: its message is above"
    rm -r "$2/debian-pip"
}

# Install what is not installed yet, and nothing where a stamp says that it is.
update_venv() { # python, run or dev, the stamp's text
    for stamp in ".venv/installed-$2" .venv/installed-dev; do
        if [ ! -e $half_made ] && [ "$(cat "$stamp" 2>/dev/null)" = "$3" ]; then
            return
        fi
    done
    echo "installing the project into .venv"
    if [ -e $half_made ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        rm -rf .venv
        mkdir .venv
        : >$half_made
        make_venv "$1" .venv
    fi
    extra=""
    [ "$2" = run ] || extra="[$2]"
    : >$half_made
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extra"; then
        rm $half_made # pip itself takes back what it could not finish, unless it is killed
        fail 2 "pip could not install the project: put right what it says above (network? disk?) and try again"
    fi
    printf '%s\n' "$3" >".venv/installed-$2"
    rm $half_made
}

# Install the project; with "dev", what tests and linters need as well. Of several scripts at once the first does it.
install_project() { # run or dev
    [ "$(uname -sm)" = "Linux x86_64" ] || fail 3 "this is $(uname -sm): the device needs Linux on x86-64"
    [ -w . ] || fail 2 "$root cannot be written to, and .venv goes there: copy it to where you may write"
    python=$(find_python)
    want=$(cat pyproject.toml && "$python" -c 'import sys; print(sys.version, sys.prefix)' && echo "$root")
    exec 9<pyproject.toml
    flock 9
    update_venv "$python" "$1" "$want"
    exec 9<&-
}
