#!/bin/sh
# What a guest costs the host, and whether it got worse: for any CI server that runs a shell, and by hand.
#
#   BALLOON_SOURCE=git+https://example.org/vhost-user-balloon.git docs/ci/measure.sh [SCENARIO.toml [OPTION ...]]
#
# Further options go to balloonlab measure. Needs an x86-64 Debian 12 or 13, an ordinary user, python3-venv and git.
#
#   BALLOON_SOURCE  what pip installs, each time anew into .venv-balloon; a tag or commit after an @ pins it
#   REPEAT          how often to measure, default 6: compare needs that for 95 % of all figures together
#   OUT             run folder, default measured; OUT/junit.xml is for the server. The build before's is at OUT.before
#   BASELINE        a folder, default baseline: a result.json there is what to compare with
#   KEEP            yes: if the budgets hold, this result becomes the baseline, whatever the comparison says, which then
#                   only informs. Set it for the branch that others are compared with
#   ACCEPT          yes: the comparison only informs here too; nothing is kept
#
# Exit status: 0 pass; 1 a budget is broken or a figure got worse; 2 usage or set-up; 3 this machine can't run it.
set -eu

: "${BALLOON_SOURCE:?set it to what pip installs, such as git+https://HOST/vhost-user-balloon.git}"
out=${OUT:-measured}
out=${out%/}
baseline=${BASELINE:-baseline}
keep=${KEEP:-no}
venv=.venv-balloon

scenario=${1:-docs/scenarios/ci.toml}
[ $# = 0 ] || shift

# A version that is there already would stay: pip goes by its number, which two commits may share.
python3 -m venv --clear "$venv" || exit 2
"$venv/bin/pip" install --quiet "$BALLOON_SOURCE" || exit 2

if [ -e "$out" ]; then
    rm -rf "$out.before"
    mv "$out" "$out.before" || exit 2
fi
"$venv/bin/balloonlab" measure "$scenario" --repeat "${REPEAT:-6}" --out "$out" "$@"

status=0
if [ -e "$baseline/result.json" ]; then
    "$venv/bin/balloonlab" compare "$baseline" "$out" || status=$?
else
    echo "Nothing to compare with yet."
fi
if [ "$keep" = yes ]; then
    mkdir -p "$baseline"
    cp "$out/result.json" "$baseline/"
    ACCEPT=yes
fi
case "$status ${ACCEPT:-no}" in
    "1 yes") echo "It got worse, which is accepted here." ;;
    "2 "*) echo "It cannot be compared, as said above: another scenario or machine, or a broken baseline." ;;
    *) exit "$status" ;;
esac
