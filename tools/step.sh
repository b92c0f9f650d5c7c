#!/usr/bin/env bash
# Run one command of a set-up, and show that it works: its lines as they come, or else how far it is every 3 seconds.
# If it fails, one line says why, and what to do.
#
#     step.sh DIRECTORY COMMAND [ARGUMENT ...]
#
# DIRECTORY is where the command downloads to and installs: how large that has become says how far it is.
set -uo pipefail

directory=$1
shift

# Downloads go there too, so that they count, and a small /tmp is no obstacle.
mkdir -p "$directory/tmp" || exit 1
TMPDIR=$(cd "$directory/tmp" && pwd)
export TMPDIR PYTHONUNBUFFERED=1

# The lines that say what happens now. Errors are explained at the end, in one line.
progress='^ *(Obtaining|Collecting|Processing|Downloading|Using cached|Getting|Preparing|Building|Installing|Successfully|added|Get:)'
lines=()
shown=0
while true; do
    if IFS= read -r -t 1 line; then
        lines+=("$line")
        if [[ $line =~ $progress ]]; then
            printf '  %.100s\n' "${line%% (from *}"
            shown=$SECONDS
        fi
    elif (($? <= 128)); then # not one second without a line, but the end
        break
    fi
    if ((SECONDS - shown >= 3)); then
        echo "  ... $SECONDS s, $(du -sm "$directory" 2> /dev/null | cut -f 1) MB"
        shown=$SECONDS
    fi
done < <("$@" 2>&1 < /dev/null)
wait $!
status=$?
rm -rf "$TMPDIR"
((status == 0)) && exit

first() {
    reason=$(printf '%s\n' "${lines[@]}" | grep -m 1 -i -E "$1" | sed -E 's/^ *(ERROR: |npm (error|ERR!) )?//')
    [[ $reason ]]
}

if first 'no space left|ENOSPC|disk quota|enough free space'; then
    message="There is no room left for $directory ($reason). Make room, and start again."
elif first 'apt install .*venv'; then # in Debian, and what is made of it
    message="This Python has no venv: $reason, and start again."
elif first 'ensurepip|no module named .?venv'; then
    message="This Python has no venv ($reason). Install its venv and ensurepip, and start again."
elif first 'npm (error|ERR!) (network|code)'; then
    message="npm could not fetch what was asked for ($reason). Check the network, and npm's settings (npm config list), and start again."
elif first 'could not find a version|connection broken|connection error|timed out'; then
    message="pip could not fetch what was asked for ($reason). Check the network, and pip's settings (pip config list), and start again."
else
    printf '%s\n' "${lines[@]}" >&2
    message="This failed, for the reason above: $*"
fi
echo "$message" >&2
exit "$status"
