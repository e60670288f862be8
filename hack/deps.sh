#!/bin/sh
# Installs the Debian packages that building and testing the project needs, where
# they are missing. Nothing that is installed is upgraded. Go is not among them:
# see "go" below.
set -eu

fail() { echo "deps: $*" >&2; exit 1; }

# gcc, libc6-dev, pkg-config, libseccomp-dev: runc is built with cgo
# busybox-static: the one program in the images that tests run
# containernetworking-plugins: CNI of devcluster's nodes
# nftables: kube-proxy's back end, and CRIU's network lock
# iproute2, procps, util-linux, mount: ip, ss, ps, nsenter, mount on the nodes
# bsdutils: script, a terminal for kubectl attach; e2fsprogs: a small disk, to be filled
# chromium, fonts-dejavu-core: tests of the HTML page look at it in a browser
packages="ca-certificates make git gcc libc6-dev pkg-config libseccomp-dev
	busybox-static containernetworking-plugins nftables iproute2 procps util-linux mount bsdutils e2fsprogs chromium fonts-dejavu-core"

# shellcheck source=/dev/null
[ -r /etc/os-release ] && . /etc/os-release
command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
	fail "this is ${PRETTY_NAME:-not Debian}: install by hand what provides:" $packages

missing=
for package in $packages; do
	state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
	[ "$state" = installed ] || missing="$missing $package"
done

if [ -n "$missing" ]; then
	[ "$(id -u)" = 0 ] || fail "not root, and these packages are missing:$missing; run: sudo $0"
	export DEBIAN_FRONTEND=noninteractive
	log=$(mktemp)
	trap 'rm -f "$log"' EXIT
	echo "deps: installing$missing"
	# shellcheck disable=SC2086 # one word a package
	install() { apt-get install -y -q --no-install-recommends --no-upgrade --no-remove $missing >"$log" 2>&1; }
	# The lists may be absent (fresh machine) or name versions that the mirror no longer
	# has, so they are fetched when the first try fails.
	if ! install; then
		apt-get update -q >"$log" 2>&1 || fail "apt-get update: $(grep -m1 '^E:' "$log" || tail -n1 "$log"): is there a network and a mirror in /etc/apt?"
		install || fail "apt-get install: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
	fi
fi

# The go command follows the toolchain line of go.mod by itself where it may download one.
want=1.26.0
command -v go >/dev/null || fail "go is missing: install Go $want or newer from https://go.dev/dl and put its bin in PATH"
have=$(go env GOVERSION)
have=${have#go}
[ "$(printf '%s\n%s\n' "$want" "${have%% *}" | sort -V | head -n1)" = "$want" ] ||
	fail "go $have is too old: Go $want or newer is needed (https://go.dev/dl)"
