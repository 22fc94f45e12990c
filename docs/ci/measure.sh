#!/bin/sh
# What a guest costs the host, and whether it got worse: for any CI server that runs a shell, and by hand.
#
#   BALLOON_SOURCE=git+https://example.org/vhost-user-balloon.git docs/ci/measure.sh [SCENARIO.toml [OPTION ...]]
#
# Further options go to balloonlab measure. Needs an x86-64 Debian 12 or 13, an ordinary user, python3-venv and git.
#
#   BALLOON_SOURCE  what pip installs; a tag or commit after an @ pins it
#   REPEAT          how often to measure, default 6: compare needs that for 95 % of all figures together
#   OUT             run folder, new or empty, default measured; OUT/junit.xml is for the server
#   BASELINE        a folder: a result.json there is what to compare with
#   KEEP            yes: after a good run, put its result into BASELINE. Set it for the branch that others are compared with
#
# Exit status: 0 pass; 1 a budget is broken or a figure got worse; 2 usage or set-up; 3 this machine can't run it.
set -eu

: "${BALLOON_SOURCE:?set it to what pip installs, such as git+https://HOST/vhost-user-balloon.git}"
out=${OUT:-measured}
baseline=${BASELINE:-baseline}
venv=${XDG_CACHE_HOME:-$HOME/.cache}/vhost-user-balloon-venv

scenario=${1:-docs/scenarios/ci.toml}
[ $# = 0 ] || shift

python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade "$BALLOON_SOURCE"
"$venv/bin/balloonlab" measure "$scenario" --repeat "${REPEAT:-6}" --out "$out" "$@"
if [ -e "$baseline/result.json" ]; then
    "$venv/bin/balloonlab" compare "$baseline" "$out"
else
    echo "Nothing to compare with yet."
fi
if [ "${KEEP:-no}" = yes ]; then
    mkdir -p "$baseline"
    cp "$out/result.json" "$baseline/"
fi
