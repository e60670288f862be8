#!/bin/sh
# Unpacks Debian packages, and what they depend on, into a directory tree to make an
# image of: without root, chroot or debootstrap, and without running their scripts.
#
#   hack/debian.sh [-b BASE] OUT PACKAGE... [-PACKAGE...]
#
#   -b BASE      an earlier OUT: what is in it is left out
#   PACKAGE      with what it depends on, not what it recommends
#   -PACKAGE     is left out though others depend on it
#
#   OUT/root     the tree, without documentation and translations
#   OUT/PACKAGES the packages (name, version) in it; written last
#
# An OUT that is complete is left as it is: the caller names it by what it is made of.
# hack/apt.sh says where the packages come from; apt's lists are kept in
# ${STASIS_CACHE:-~/.cache/stasis}/debian. The release is this machine's.
set -eu

fail() { echo "debian: $*" >&2; exit 1; }

base=
if [ "${1:-}" = -b ]; then
	base=$2
	shift 2
	[ -f "$base/PACKAGES" ] || fail "$base was not made by this script: it has no PACKAGES"
fi
[ $# -ge 2 ] || fail "usage: $0 [-b BASE] OUT PACKAGE... [-PACKAGE...]"
out=$1
shift
[ ! -f "$out/PACKAGES" ] || exit 0
for tool in flock tar; do
	command -v "$tool" >/dev/null || fail "$tool is missing: this needs a Debian machine (or container)"
done
# shellcheck source=hack/apt.sh
. "$(dirname "$0")/apt.sh"

wanted=
left=
for package; do
	case $package in
	-*) left="$left ${package#-}" ;;
	*) wanted="$wanted $package" ;;
	esac
done

cache=${STASIS_CACHE:-${HOME:?HOME is not set}/.cache/stasis}/debian
mkdir -p "$cache" "$(dirname "$out")"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
exec 9>"$cache/lock" # one at a time: the lists are shared
flock 9
[ ! -f "$out/PACKAGES" ] || exit 0 # another has made it meanwhile

apt_begin "$cache" "$work/log"
# shellcheck disable=SC2086 # one word a package
run_apt install -s --no-install-recommends $wanted || fail "resolving$wanted: $(apt_complaint)"
sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1 \2/p' "$work/log" | sort >"$work/all"
[ -s "$work/all" ] || fail "apt resolves$wanted to nothing; its last line: $(tail -n1 "$work/log")"
{
	[ -z "$base" ] || cut -d' ' -f1 "$base/PACKAGES"
	for package in $left; do echo "$package"; done
} | sort >"$work/have"
join -v1 "$work/all" "$work/have" >"$work/PACKAGES"

root=$work/root
mkdir -p "$root" "$work/debs"
# Debian's /bin, /lib and /sbin are links into /usr; no package brings them yet.
mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/usr/lib64"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
(
	cd "$work/debs"
	# shellcheck disable=SC2046 # one word a package
	run_apt download $(tr ' ' = <"$work/PACKAGES")
) || fail "fetching the packages: $(apt_complaint)"
for deb in "$work"/debs/*.deb; do
	dpkg-deb --fsys-tarfile "$deb" | tar -C "$root" -x --keep-directory-symlink --no-same-owner \
		--exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/info' --exclude='./usr/share/locale' \
		--exclude='./usr/share/lintian' --exclude='./usr/share/bug' --exclude='./usr/lib/systemd' --exclude='./lib/systemd/system' ||
		fail "unpacking $(basename "$deb")"
done

# What the packages' own scripts would have done, as far as their programs need it.
if [ -f "$root/usr/share/base-passwd/passwd.master" ]; then
	cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
	cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
	echo "app:x:1000:1000::/tmp:/bin/sh" >>"$root/etc/passwd"
	echo "app:x:1000:" >>"$root/etc/group"
	ln -sf bash "$root/usr/bin/sh"
fi
# Python's programs start from compiled files. Their times are not kept in an image,
# so they must be valid unchecked.
if [ -x "$root/usr/bin/python3.11" ] && [ -n "$base" ]; then
	libraries=usr/lib/$(gcc -print-multiarch 2>/dev/null || echo x86_64-linux-gnu)
	"$base/root/$libraries/ld-linux-x86-64.so.2" --library-path "$base/root/$libraries:$root/$libraries" \
		"$root/usr/bin/python3.11" -I -S -m compileall -q -j0 --invalidation-mode unchecked-hash -s "$root" -p / \
		"$root/usr/lib/python3.11" "$root/usr/lib/python3" >"$work/log" 2>&1 || grep -q 'SyntaxError' "$work/log" ||
		fail "compiling the Python modules: $(tail -n1 "$work/log")"
fi
chmod -R u+rwX "$root"

mkdir -p "$work/made"
mv "$root" "$work/PACKAGES" "$work/made/"
rm -rf "$out"
mv -T "$work/made" "$out"
