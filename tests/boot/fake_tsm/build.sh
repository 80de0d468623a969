#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Build fake_tsm.ko against a kernel's headers (Debian: linux-headers-VERSION and the compiler it was built with), stripped.
# The kernel's build writes beside the sources, so it gets a copy of them.
#
#   build.sh OUTPUT.ko HEADERS      HEADERS: /usr/src/linux-headers-6.12.117+deb12-cloud-amd64
set -eu
output=$1 headers=$2
sources=$(dirname "$(realpath "$0")")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp "$sources/Kbuild" "$sources/fake_tsm.c" "$copy/"
# Without type information (BTF), which takes pahole and a vmlinux, and which nobody reads here.
make -s -C "$headers" M="$copy" CONFIG_DEBUG_INFO_BTF_MODULES= modules
strip --strip-debug -o "$output" "$copy/fake_tsm.ko"
