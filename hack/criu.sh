#!/bin/sh
# Makes a directory that holds CRIU together with the libraries that it was built for,
# so that it runs on hosts whose own libraries are older and changes nothing there.
#
#   hack/criu.sh OUTDIR    (OUTDIR must not exist, or be one that this script made)
#
#   OUTDIR/etc/.criu       options that CRIU reads whoever starts it
#   OUTDIR/bin/criu        launcher; finds the rest relative to itself, so the tree may be copied anywhere
#   OUTDIR/lib, libexec    the dynamic linker, shared libraries, the program
#   OUTDIR/VERSION         the version of CRIU, one line
#   OUTDIR/PACKAGES        the Debian packages (name, version) that it consists of
#   OUTDIR/share/doc       their copyright files
#
# The packages come from the mirror that this machine's apt is configured for, with
# Debian's archive keys as this machine has them. apt works on lists and a package
# database of its own, in a temporary directory: the system's are not touched.
set -eu

# The first Debian release whose CRIU knows current kernels: bookworm's 3.17 fails on the
# vDSO, and trixie's 4.1 cannot dump a process that has an internet socket since Linux 6.16
# (SO_PASSCRED of such a socket is an error there); 4.2 can.
suite=${STASIS_CRIU_SUITE:-forky}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() { echo "criu: $*" >&2; exit 1; }

[ $# = 1 ] || fail "usage: $0 OUTDIR"
out=$1
if [ -e "$out" ] && [ ! -f "$out/VERSION" ]; then
	fail "$out exists and was not made by this script: remove it or name another directory"
fi
for tool in apt-get dpkg dpkg-deb sha256sum; do
	command -v "$tool" >/dev/null || fail "$tool is missing: this needs a Debian machine (or container)"
done
[ -r "$keyring" ] || fail "$keyring is missing: install debian-archive-keyring"

# Kept under a key made from all that decides the result, except the mirror's state: delete the
# directory (or set STASIS_CRIU_REFRESH=1) to take up a newer package.
arch=$(dpkg --print-architecture)
key=$( (cat "$0"; echo "$arch $suite") | sha256sum | cut -c1-16)
cached=${STASIS_CACHE:-${HOME:?HOME is not set}/.cache/stasis}/criu/$key
work=
cleanup() { [ -z "$work" ] || rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

build() {
	mkdir -p "$(dirname "$cached")"
	work=$(mktemp -d "$cached.XXXXXX")
	mkdir -p "$work/etc" "$work/lists/partial" "$work/archives/partial" "$work/tree" "$work/unpacked"
	: >"$work/status"

	# The machine's own mirror serves other releases too. It is the source of this machine's
	# release; of several, the one that also has its updates.
	# shellcheck source=/dev/null
	release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	[ -n "$release" ] || fail "/etc/os-release names no release: this needs a Debian machine (or container)"
	sources=$(apt-get -q -o Debug::NoLocking=1 update --print-uris 2>/dev/null | sed -n "s#^'\(.*\)/dists/\(.*\)/InRelease'.*#\2 \1#p")
	main=$(echo "$sources" | sed -n "s#^$release-updates ##p" | head -n1)
	[ -n "$main" ] || main=$(echo "$sources" | sed -n "s#^$release ##p" | head -n1)
	security=$(echo "$sources" | sed -n "s#^$release-security ##p" | head -n1)
	[ -n "$main" ] || fail "apt has no Debian mirror of $release on this machine: check /etc/apt/sources.list and /etc/apt/sources.list.d"
	echo "deb [signed-by=$keyring] $main $suite main" >"$work/etc/sources.list"
	[ -z "$security" ] || echo "deb [signed-by=$keyring] $security $suite-security main" >>"$work/etc/sources.list"

	run_apt() {
		apt-get -q \
			-o Dir::State="$work" -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" \
			-o Dir::Cache="$work" -o Dir::Cache::archives="$work/archives" \
			-o Dir::Etc::sourcelist="$work/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null \
			-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
			-o Dir::Log="$work" -o APT::Sandbox::User="$(id -un)" -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
			-o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Get::AllowUnauthenticated=false \
			"$@" >"$work/log" 2>&1
	}
	run_apt update || fail "fetching the package lists of $suite: $(grep -m1 '^[EW]:' "$work/log" || tail -n1 "$work/log")"
	# apt treats a list it could not fetch as a warning.
	if grep -q '^[EW]:' "$work/log"; then fail "fetching the package lists of $suite: $(grep -m1 '^[EW]:' "$work/log")"; fi
	run_apt install -y --download-only --no-install-recommends criu ||
		fail "fetching the packages: $(grep -m1 '^E:' "$work/log" || tail -n1 "$work/log")"

	tree=$work/tree
	mkdir -p "$tree/bin" "$tree/lib" "$tree/libexec" "$tree/share/doc"
	for deb in "$work"/archives/*.deb; do
		[ -e "$deb" ] || fail "apt fetched no packages; its last lines: $(tail -n3 "$work/log")"
		dpkg-deb -x "$deb" "$work/unpacked"
		dpkg-deb -W --showformat='${Package} ${Version}\n' "$deb" >>"$tree/PACKAGES"
	done
	for copyright in "$work"/unpacked/usr/share/doc/*/copyright; do
		name=$(basename "$(dirname "$copyright")")
		cp -L "$copyright" "$tree/share/doc/$name" 2>/dev/null || true # a link to a package that is not here
	done
	(cd "$work/unpacked" && find . \( -type f -o -type l \) -name '*.so*' \
		! -path '*/gconv/*' ! -path '*/audit/*' ! -path '*/criu/*') >"$work/libraries"
	while read -r library; do
		# A link to a file beside it stays one; a link elsewhere would lead nowhere.
		case $(readlink "$work/unpacked/$library") in
		*/*) ;;
		*) cp -P "$work/unpacked/$library" "$tree/lib/" ;;
		esac
	done <"$work/libraries"
	cp "$work/unpacked/usr/sbin/criu" "$tree/libexec/criu"
	linker=$(cd "$tree/lib" && ls -d ld-linux*.so.* 2>/dev/null | head -n1)
	[ -n "$linker" ] || fail "no dynamic linker among the packages: $(tr '\n' ',' <"$tree/PACKAGES")"
	chmod 0755 "$tree/lib/$linker" "$tree/libexec/criu"

	# CRIU_LIBS_DIR: plugins of another CRIU that the host may have must not be loaded.
	# The directory must exist, and an empty one gets lost on the way through archives.
	mkdir -p "$tree/lib/plugins"
	echo "No plugins are shipped." >"$tree/lib/plugins/README"
	cat >"$tree/bin/criu" <<-EOF
		#!/bin/sh
		# Starts CRIU with the libraries beside it instead of the host's.
		self=\$(readlink -f "\$0")
		prefix=\${self%/bin/*}
		export CRIU_LIBS_DIR="\$prefix/lib/plugins"
		# Where CRIU looks for .criu/default.conf (criu(8)), whoever starts it.
		export HOME="\$prefix/etc"
		# A write past the limit of file sizes then fails instead of ending CRIU: that
		# is how Stasis has it give up in good order.
		trap '' XFSZ
		# Stasis sets this to restore a container whose Pod's System V shared memory is there.
		preload=\${STASIS_JOIN_SHM:+\$prefix/lib/stasis-joinshm.so}
		# And this to capture processes without their memory.
		preload=\${STASIS_NO_PAGES:+\$prefix/lib/stasis-nopages.so}\$preload
		exec "\$prefix/lib/$linker" --inhibit-cache --library-path "\$prefix/lib" \${preload:+--preload "\$preload"} --argv0 criu "\$prefix/libexec/criu" "\$@"
	EOF
	chmod 0755 "$tree/bin/criu"
	# CRIU would bar a Pod's network with packet filter rules while it captures, and leave
	# them there when it is killed. Nothing sends while the Pod stands still: all of its
	# containers do. It would also need iptables on the node.
	mkdir -p "$tree/etc/.criu"
	# A file that is open and has no name any more is kept with the images, up to this size
	# (by default 1M: a database's temporary files are larger). internal/engine/criu refuses
	# larger ones before it freezes anything.
	printf '%s\n' "network-lock skip" "ghost-limit 2G" >"$tree/etc/.criu/default.conf"
	sort -o "$tree/PACKAGES" "$tree/PACKAGES"
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
