#!/usr/bin/env bash
# Make a virtual environment: say what it is for and how large it becomes, check Python and the disk, let pip install.
#
#     set_up.sh PYTHON DIRECTORY MEGABYTES MINUTES PURPOSE PIP-ARGUMENT ...
#
# DIRECTORY/.incomplete is there from the first moment on. Whoever has finished the set-up renames it.
set -euo pipefail

python=$1 directory=$2 megabytes=$3 minutes=$4 purpose=$5
shift 5
step=$(dirname "$0")/step.sh

fail() {
    echo "$*" >&2
    exit 1
}

command -v "$python" > /dev/null || fail "There is no $python here: install Python, or name the one to use, as in: make demo PYTHON=python3.12"
# Before venv and pip, which say other things where Python is too old. The oldest that will do stands in pyproject.toml.
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
version=$("$python" -c 'import platform; print(platform.python_version())' 2> /dev/null) || fail "$python does not run: install Python $oldest or newer, and name it, as in: make demo PYTHON=python3.12"
if [[ $(printf '%s\n' "$oldest" "$version" | sort --version-sort | head -n 1) != "$oldest" ]]; then
    fail "$python is Python $version, and $oldest or newer is needed: install one, and name it, as in: make demo PYTHON=python3.12"
fi

# What an interrupted set-up left must go: pip takes a package of which files are missing for an installed one.
if [[ -e $directory/.incomplete ]]; then
    echo "Removing $directory, whose set-up did not come to its end."
    rm -rf "$directory"
fi
mkdir -p "$directory"

# While pip works, what it has downloaded lies next to what it has unpacked: a third more.
needed=$((megabytes * 4 / 3 - $(du -sm "$directory" | cut -f 1)))
free=$(df -Pm "$directory" | awk 'NR == 2 { print $4 }')
if ((free < needed)); then
    fail "There is no room for $directory: setting it up takes $needed MB, and $free MB are free on its disk. Make room, and start again."
fi

touch "$directory/.incomplete"
echo "Setting up $directory for $purpose: about $megabytes MB (more where pip finds a torch with CUDA), $minutes minutes."
bash "$step" "$directory" "$python" -m venv "$directory"
bash "$step" "$directory" "$directory/bin/python" -m pip install --disable-pip-version-check --no-compile "$@"
# On all cores, which takes half the time of pip's own compiling, and without a third that hardly anybody imports: the
# packages' own tests, the models of Transformers, and what Ray and moto have for other uses.
echo "  Compiling what was installed"
bash "$step" "$directory" "$directory/bin/python" -c \
    'import compileall, re, sys; rarely = re.compile("/(tests?|models|ray|moto)/")
compileall.compile_dir(sys.argv[1], quiet=2, workers=0, rx=rarely)' "$directory/lib"
