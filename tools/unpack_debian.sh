#!/usr/bin/env bash
# Unpack a package of Debian, and the packages it needs that are not installed, in a directory: without root.
#
#     unpack_debian.sh DIRECTORY PACKAGE
set -euo pipefail

target=$1 package=$2
if ! command -v apt-get dpkg-deb > /dev/null; then
    echo "A test needs $package. This system has no apt-get to fetch it with: install $package." >&2
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
    apt_get install --no-install-recommends --simulate "$package" | sed -n 's/^Inst \([^ ]*\) .*/\1/p'
)
apt_get download "${packages[@]}"
for archive in *.deb; do
    dpkg-deb --extract "$archive" .
done
rm -r apt -- *.deb
