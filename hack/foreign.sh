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
# Prints the dynamic linker's name in TREE/lib. hack/apt.sh says where the packages come from.
set -eu

fail() { echo "${0##*/}: $*" >&2; exit 1; }

[ $# -ge 4 ] || fail "usage: $0 SUITE TREE PROGRAM PACKAGE..."
suite=$1
tree=$2
program=$3
shift 3
# shellcheck source=hack/apt.sh
. "$(dirname "$0")/apt.sh"
mkdir -p "$tree"
work=$(mktemp -d "$tree.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

mkdir -p "$work/unpacked"
apt_begin "$work" "$work/log" "$suite"
run_apt install -y --download-only --no-install-recommends "$@" ||
	fail "fetching the packages: $(apt_complaint)"

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
