#!/usr/bin/env bash
# Debian's Chromium for the tests of this folder, where it is missing and this is root; they skip where there is none.
set -euo pipefail
[ ! -x /usr/bin/chromium ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no /usr/bin/chromium, and no apt-get as root to install it: tests/browser will skip" >&2
    exit 0
fi
echo "installing chromium" >&2
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; } >&2 ||
    echo "apt-get install chromium failed: tests/browser will skip" >&2
