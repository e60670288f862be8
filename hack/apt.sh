# Sourced by scripts that fetch Debian packages: apt with lists and a package database of
# its own, in which nothing is installed. The system's are not touched. The packages come
# from the mirror that this machine's apt is configured for, with Debian's archive keys as
# this machine has them. Whoever sources it has a function fail that ends the script.
# shellcheck shell=sh

# apt_begin STATE LOG [SUITE] prepares a directory for apt's state, and the lists of a Debian
# release, by default this machine's. What apt says goes to LOG. It sets release and arch.
apt_begin() {
	apt_state=$1
	apt_log=$2
	for tool in apt-get dpkg dpkg-deb; do
		command -v "$tool" >/dev/null || fail "$tool is missing: this needs a Debian machine (or container)"
	done
	apt_keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -r "$apt_keyring" ] || fail "$apt_keyring is missing: install debian-archive-keyring"
	arch=$(dpkg --print-architecture)
	mkdir -p "$apt_state/lists/partial" "$apt_state/archives/partial"
	: >"$apt_state/status"

	# The machine's own mirror serves other releases too. It is the source of this machine's
	# release; of several, the one that also has its updates.
	# shellcheck source=/dev/null
	release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	[ -n "$release" ] || fail "/etc/os-release names no release: this needs a Debian machine (or container)"
	apt_sources=$(apt-get -q -o Debug::NoLocking=1 update --print-uris 2>/dev/null | sed -n "s#^'\(.*\)/dists/\(.*\)/InRelease'.*#\2 \1#p")
	apt_main=$(echo "$apt_sources" | sed -n "s#^$release-updates ##p" | head -n1)
	[ -n "$apt_main" ] || apt_main=$(echo "$apt_sources" | sed -n "s#^$release ##p" | head -n1)
	apt_security=$(echo "$apt_sources" | sed -n "s#^$release-security ##p" | head -n1)
	[ -n "$apt_main" ] || fail "apt has no Debian mirror of $release on this machine: check /etc/apt/sources.list and /etc/apt/sources.list.d"
	suite=${3:-$release}
	echo "deb [signed-by=$apt_keyring] $apt_main $suite main" >"$apt_state/sources.list"
	[ -z "$apt_security" ] || echo "deb [signed-by=$apt_keyring] $apt_security $suite-security main" >>"$apt_state/sources.list"

	run_apt update || fail "fetching the package lists of $suite: $(apt_complaint)"
	# apt treats a list it could not fetch as a warning.
	if grep -q '^[EW]:' "$apt_log"; then fail "fetching the package lists of $suite: $(apt_complaint)"; fi
}

run_apt() {
	apt-get -q \
		-o Dir::State="$apt_state" -o Dir::State::lists="$apt_state/lists" -o Dir::State::status="$apt_state/status" \
		-o Dir::Cache="$apt_state" -o Dir::Cache::archives="$apt_state/archives" \
		-o Dir::Etc::sourcelist="$apt_state/sources.list" -o Dir::Etc::sourceparts=/dev/null \
		-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
		-o Dir::Log="$apt_state" -o APT::Sandbox::User="$(id -un)" -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
		-o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Get::AllowUnauthenticated=false \
		"$@" >"$apt_log" 2>&1
}

# apt_complaint is what the last call was about.
apt_complaint() { grep -m1 '^E:' "$apt_log" || grep -m1 '^W:' "$apt_log" || tail -n1 "$apt_log"; }
