#!/usr/bin/env bash
# Debian's Chromium, and what it needs that is not installed, in a directory of its own: nobody has to be root for it.
#
#     unpack_chromium.sh DIRECTORY
set -euo pipefail

target=$1
if ! command -v apt-get dpkg-deb > /dev/null; then
    echo "A test opens TensorBoard in Chromium. This system has no apt-get to fetch it with: install chromium." >&2
    exit 1
fi
rm -rf "$target"
mkdir -p "$target/apt/lists/partial" "$target/apt/archives/partial"
chmod 755 "$target"
cd "$target"

apt_get() {
    apt-get -qq -o Dir::State::Lists="$PWD/apt/lists" -o Dir::Cache="$PWD/apt" -o Debug::NoLocking=1 \
        -o APT::Sandbox::User=root "$@"
}

apt_get update
mapfile -t packages < <(
    apt_get install --no-install-recommends --simulate chromium | sed -n 's/^Inst \([^ ]*\) .*/\1/p'
)
apt_get download "${packages[@]}"
for package in *.deb; do
    dpkg-deb --extract "$package" .
done
rm -r apt -- *.deb
