#!/bin/sh
# Makes a directory that holds CRIU together with the libraries that it was built for,
# so that it runs on hosts whose own libraries are older and changes nothing there.
#
#   hack/criu.sh OUTDIR    (OUTDIR must not exist, or be one that this script made)
#
#   OUTDIR/etc/.criu       options that CRIU reads whoever starts it
#   OUTDIR/bin/criu        launcher (internal/engine/criu/launcher); finds the rest relative to itself, so the tree may be copied anywhere
#   OUTDIR/lib, libexec    the dynamic linker, shared libraries, the program
#   OUTDIR/VERSION         the version of CRIU, one line
#   OUTDIR/PACKAGES        the Debian packages (name, version) that it consists of
#   OUTDIR/share/doc       their copyright files
#
# hack/apt.sh says where the packages come from.
set -eu

# The first Debian release whose CRIU knows current kernels: bookworm's 3.17 fails on the
# vDSO, and trixie's 4.1 cannot dump a process that has an internet socket since Linux 6.16
# (SO_PASSCRED of such a socket is an error there); 4.2 can.
suite=${STASIS_CRIU_SUITE:-forky}

fail() { echo "criu: $*" >&2; exit 1; }

[ $# = 1 ] || fail "usage: $0 OUTDIR"
out=$1
if [ -e "$out" ] && [ ! -f "$out/VERSION" ]; then
	fail "$out exists and was not made by this script: remove it or name another directory"
fi
command -v dpkg >/dev/null || fail "dpkg is missing: this needs a Debian machine (or container)"
foreign=$(dirname "$0")/foreign.sh
launcher=$(dirname "$0")/../internal/engine/criu/launcher/launcher.c

# Kept under a key made from all that decides the result, except the mirror's state: delete the
# directory (or set STASIS_CRIU_REFRESH=1) to take up a newer package.
arch=$(dpkg --print-architecture)
key=$( (cat "$0" "$foreign" "$launcher" "$(dirname "$0")/apt.sh"; echo "$arch $suite") | sha256sum | cut -c1-16)
cached=${STASIS_CACHE:-${HOME:?HOME is not set}/.cache/stasis}/criu/$key
work=
cleanup() { [ -z "$work" ] || rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

build() {
	mkdir -p "$(dirname "$cached")"
	work=$(mktemp -d "$cached.XXXXXX")
	tree=$work/tree
	linker=$("$foreign" "$suite" "$tree" usr/sbin/criu criu)
	mkdir -p "$tree/bin"

	# CRIU_LIBS_DIR: plugins of another CRIU that the host may have must not be loaded.
	# The directory must exist, and an empty one gets lost on the way through archives.
	mkdir -p "$tree/lib/plugins"
	echo "No plugins are shipped." >"$tree/lib/plugins/README"
	${CC:-cc} -std=c11 -D_GNU_SOURCE -D_FORTIFY_SOURCE=2 -O2 -fstack-protector-strong -fPIE -Wall -Wextra -Werror -static-pie -Wl,-z,relro,-z,now -s -DLINKER="\"$linker\"" -o "$tree/bin/criu" "$launcher"
	chmod 0755 "$tree/bin/criu"
	# CRIU would bar a Pod's network with packet filter rules while it captures, and leave
	# them there when it is killed. Nothing sends while the Pod stands still: all of its
	# containers do. It would also need iptables on the node.
	mkdir -p "$tree/etc/.criu"
	# A file that is open and has no name any more is kept with the images, up to this size
	# (by default 1M: a database's temporary files are larger). internal/engine/criu refuses
	# larger ones before it freezes anything.
	# Connections that nobody has accepted yet (a probe's that came while the container was
	# frozen) are left out: CRIU cannot capture them, and their other ends are connected to the
	# source, which goes on.
	printf '%s\n' "network-lock skip" "ghost-limit 2G" "skip-in-flight" >"$tree/etc/.criu/default.conf"
	"$tree/bin/criu" --version >"$work/version" 2>&1 || fail "the CRIU that was fetched does not run: $(head -n1 "$work/version")"
	sed -n 's/^Version: //p' "$work/version" >"$tree/VERSION"
	[ -s "$tree/VERSION" ] || fail "the CRIU that was fetched does not tell its version: $(head -n1 "$work/version")"
	chmod -R u=rwX,go=rX "$tree"

	# Another run may have been faster: its result is as good.
	mv -T "$tree" "$cached" 2>/dev/null || [ -f "$cached/VERSION" ] || fail "cannot move the result to $cached"
	rm -rf "$work"
	work=
}

if [ "${STASIS_CRIU_REFRESH:-}" = 1 ]; then rm -rf "$cached"; fi
[ -f "$cached/VERSION" ] || build

mkdir -p "$(dirname "$out")"
fresh=$(mktemp -d "$out.XXXXXX")
work=$fresh
cp -a "$cached/." "$fresh/"
chmod 0755 "$fresh"
rm -rf "$out"
mv -T "$fresh" "$out"
work=
