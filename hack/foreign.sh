#!/bin/sh
# Makes a directory that holds a program of another Debian release together with the
# libraries that it was built for, so that it runs here and changes nothing here.
#
#   hack/foreign.sh SUITE TREE PROGRAM PACKAGE...
#
#   PROGRAM              its path in the packages, such as usr/sbin/criu
#   TREE/lib             the dynamic linker and shared libraries
#   TREE/libexec/NAME    the program
#   TREE/PACKAGES        the Debian packages (name, version) that it consists of
#   TREE/share/doc       their copyright files
#
# Prints the dynamic linker's name in TREE/lib. The packages come from the mirror that this
# machine's apt is configured for, with Debian's archive keys as this machine has them. apt
# works on lists and a package database of its own, in a temporary directory: the system's
# are not touched.
set -eu

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() { echo "${0##*/}: $*" >&2; exit 1; }

[ $# -ge 4 ] || fail "usage: $0 SUITE TREE PROGRAM PACKAGE..."
suite=$1
tree=$2
program=$3
shift 3
for tool in apt-get dpkg dpkg-deb; do
	command -v "$tool" >/dev/null || fail "$tool is missing: this needs a Debian machine (or container)"
done
[ -r "$keyring" ] || fail "$keyring is missing: install debian-archive-keyring"
arch=$(dpkg --print-architecture)
mkdir -p "$tree"
work=$(mktemp -d "$tree.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

mkdir -p "$work/etc" "$work/lists/partial" "$work/archives/partial" "$work/unpacked"
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
run_apt install -y --download-only --no-install-recommends "$@" ||
	fail "fetching the packages: $(grep -m1 '^E:' "$work/log" || tail -n1 "$work/log")"

mkdir -p "$tree/lib" "$tree/libexec" "$tree/share/doc"
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
cp "$work/unpacked/$program" "$tree/libexec/"
linker=$(cd "$tree/lib" && ls -d ld-linux*.so.* 2>/dev/null | head -n1)
[ -n "$linker" ] || fail "no dynamic linker among the packages: $(tr '\n' ',' <"$tree/PACKAGES")"
chmod 0755 "$tree/lib/$linker" "$tree/libexec/${program##*/}"
sort -o "$tree/PACKAGES" "$tree/PACKAGES"
echo "$linker"
