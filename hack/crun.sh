#!/bin/sh
# Makes a directory that holds a crun which can checkpoint, with its libraries and CRIU's:
# bookworm's is built without that.
#
#   hack/crun.sh OUTDIR    (OUTDIR must not exist)
#
#   OUTDIR/bin/crun        launcher; finds the rest relative to itself, so the tree may be copied anywhere
#   OUTDIR/...             as hack/foreign.sh makes it
set -eu

suite=forky
out=$1
[ ! -e "$out" ] || { echo "crun: $out exists" >&2; exit 1; }
linker=$("$(dirname "$0")/foreign.sh" "$suite" "$out" usr/bin/crun crun libcriu2)
mkdir -p "$out/bin"
cat >"$out/bin/crun" <<-EOF
	#!/bin/sh
	# Starts crun with the libraries beside it instead of the host's.
	self=\$(readlink -f "\$0")
	prefix=\${self%/bin/*}
	exec "\$prefix/lib/$linker" --inhibit-cache --library-path "\$prefix/lib" --argv0 crun "\$prefix/libexec/crun" "\$@"
EOF
chmod 0755 "$out/bin/crun"
chmod -R u=rwX,go=rX "$out"
"$out/bin/crun" --version | grep -q '+CRIU' || { echo "crun: the crun that was fetched cannot checkpoint" >&2; exit 1; }
