#!/usr/bin/env bash
# Run one command of a set-up, and show that it works: its lines as they come, or else every 2 seconds how far it is.
# If it fails, one line says why, and what to do.
#
#     step.sh DIRECTORY COMMAND [ARGUMENT ...]
#
# DIRECTORY is where the command downloads to and installs: how large that has become says how far it is.
set -uo pipefail

directory=$1
shift

# Downloads go there too, so that they count, and a small /tmp is no obstacle. Several steps may run side by side.
mkdir -p "$directory" || exit 1
TMPDIR=$(mktemp -d "$(cd "$directory" && pwd)/tmp.XXXXXX") || exit 1
export TMPDIR PYTHONUNBUFFERED=1

# The lines that say what happens now. Errors are explained at the end, in one line.
progress='^ *(Obtaining|Collecting|Processing|Downloading|Using cached|Getting|Preparing|Building|Installing|Successfully|added|Get:)'
lines=() line=''
shown=0
while true; do
    IFS= read -r -t 1 part
    status=$? # above 128 when the second is over, which may be in the middle of a line
    line+=$part
    if ((status <= 128)) && [[ $line ]]; then
        if [[ $line =~ $progress ]]; then
            printf '  %.100s\n' "${line%% (from *}"
            shown=$SECONDS
        fi
        lines+=("$line")
        line=''
    fi
    if ((status > 0 && status <= 128)); then
        break
    fi
    if ((SECONDS - shown >= 2)); then
        size=$(timeout 1 du -sm "$directory" 2> /dev/null | cut -f 1) # a busy machine needs longer
        echo "  ... $SECONDS s${size:+, $size MB}"
        shown=$SECONDS
    fi
done < <("$@" 2>&1 < /dev/null)
wait $!
status=$?
rm -rf "$TMPDIR"
((status == 0)) && exit

first() {
    reason=$(printf '%s\n' "${lines[@]}" | grep -m 1 -i -E "$1" | sed -E 's/^ *((ERROR|WARNING): |npm (error|ERR!) )?//')
    [[ $reason ]]
}

free=$(df -Pm "$directory" | awk 'NR == 2 { print $4 }')
if first 'no space left|ENOSPC|disk quota|enough free space' || ((free < 20)); then # not every command says so
    message="There is no room left for $directory: $free MB are free on its disk${reason:+ ($reason)}. Make room, and start again."
elif first 'apt install .*venv'; then # in Debian
    message="This Python has no venv: $reason, and start again."
elif first 'ensurepip|no module named .?venv'; then
    message="This Python has no venv ($reason). Install its venv and ensurepip, and start again."
elif first 'npm (error|ERR!) (code|network)'; then
    message="npm could not fetch ${!#} ($reason). Check the network, and npm's settings (npm config list), and start again."
elif first 'could not find a version' || first 'connection broken|timed out'; then
    message="pip could not fetch all packages ($reason). Check the network, and pip's settings (pip config list), and start again."
else
    printf '%s\n' "${lines[@]}" >&2
    message="This failed, for the reason above: $*"
fi
echo "$message" >&2
exit "$status"
