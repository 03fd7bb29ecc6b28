#!/usr/bin/env bash
# Installs what ringattn builds with, on Debian and its kin. Asks for nothing when all of it is there.
# usage: install_dependencies.sh [extra Debian package ...]
set -euo pipefail

packages=(gcc make cmake ninja-build pkg-config libcjson-dev libpcre2-dev libutf8proc-dev libxxhash-dev
          libopenblas-dev libcmocka-dev "$@")

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "install_dependencies.sh: needs root or sudo to install: ${missing[*]}" >&2; exit 2; }
    as_root=(sudo)
fi
echo "installing: ${missing[*]}" >&2
"${as_root[@]}" apt-get update -qq >&2
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
