#!/bin/sh
# What the tests need of the system: real servers. Installed when this is Debian and we are root;
# otherwise said, and the tests that need them are skipped (in CI such a skip is a failure).
set -eu
wanted="openssh-server openssh-client dropbear-bin iproute2 postgresql procps"
missing=""
for package in $wanted; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, their tests will be skipped:$missing" >&2
    exit 0
fi
echo "installing for the tests:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# The packages' own services are not wanted: tests start their own servers, on loopback, as they need them.
# shellcheck disable=SC2086
RUNLEVEL=1 apt-get -qq install --yes --no-install-recommends $missing >/dev/null
