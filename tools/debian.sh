#!/usr/bin/env bash
# Install the Debian packages that some tests need: a browser, fonts of Chinese, Japanese and Korean,
# and SLURM with its authentication. Called by make. Without apt-get or root, it only prints the names of the missing ones.
set -euo pipefail
packages=(chromium fonts-noto-cjk slurm-wlm munge shellcheck)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} = 0 ]; then exit; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "some tests need these packages of your distribution: ${missing[*]}" >&2
    exit
fi
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
