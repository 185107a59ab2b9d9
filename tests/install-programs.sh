#!/usr/bin/env bash
# Install the programs that some tests run: with apt, as root or by a sudo that asks for no password. Elsewhere say how to get them.
set -euo pipefail

PATH=$PATH:/usr/sbin # where Debian has nginx
missing=()
for program in chromium curl nginx; do
  command -v "$program" >/dev/null || missing+=("${program/nginx/nginx-light}")
done
if ((${#missing[@]} == 0)); then
  exit
fi

as_root() {
  if ((EUID == 0)); then "$@"; else sudo --non-interactive "$@"; fi
}

if command -v apt-get >/dev/null && as_root true 2>/dev/null; then
  echo "Installing ${missing[*]} ..."
  if as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    exit
  fi
fi
echo "Tests that need ${missing[*]} are skipped; to run them, install these: sudo apt-get install ${missing[*]}" >&2
