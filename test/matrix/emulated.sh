#!/bin/sh
# Runs tests of the CRI layer (test/cri) in an emulated machine, where systemd makes all
# control groups, of version 2: see hack/emulated.sh.
#
#   test/matrix/emulated.sh TESTS     a regular expression, as for go test -run
#
# Prints what go test -v does. What is run is built here.
set -eu
cd "$(dirname "$0")/../.."
root=$PWD
seconds=${STASIS_EMULATED_SECONDS:-3600}

for made in bin/devcluster dist/bin/stasis-agent dist/bin/stasis-runtime dist/bin/stasis-restore dist/criu/VERSION; do
	[ -e "$made" ] || { echo "emulated: $made is missing: run make matrix" >&2; exit 1; }
done
tree=$(mktemp -d "$root/dist/emulated.XXXXXX")
trap 'rm -rf "$tree"' EXIT
trap 'exit 1' HUP INT TERM

# All is found under the names that it has here.
bin/devcluster build -o json >"$tree/built.json"
give() { # give PATH: a copy of it, below files
	mkdir -p "$tree/files$(dirname "$1")"
	cp -a "$1" "$tree/files$1"
}
tr '",' '\n\n' <"$tree/built.json" | grep '^/' | grep -v '/kube$' | while read -r path; do give "$path"; done
for path in go.mod bin/devcluster dist/bin/stasis-agent dist/bin/stasis-runtime dist/bin/stasis-restore dist/criu; do give "$root/$path"; done
mkdir -p "$tree/files$root/test/cri"
CGO_ENABLED=0 go test -c -o "$tree/cri.test" ./test/cri
for program in hammer weaver wire; do test/cri/program.sh $program "$tree/$program"; done

cat >"$tree/start" <<EOF
set -e
bound() { mkdir -p "\$1"; mount --bind "/given/files\$1" "\$1"; }
bound '$root'
bound '$(dirname "$(dirname "$(sed -n 's/.*"Runtime":"\([^"]*\)".*/\1/p' "$tree/built.json")")")'
export STASIS_CRI_CLUSTER='--systemd-cgroup --built=/given/built.json --patience=10' STASIS_CRI_PATIENCE=10 STASIS_CRI_PROGRAMS=/given
cd '$root/test/cri'
/given/cri.test -test.v -test.timeout=$((seconds - 120))s -test.run='$1'
EOF
hack/emulated.sh "$tree" "$seconds"
