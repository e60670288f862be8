# What the applications' scripts share.
set -eu

# publish FILE LINE... writes the state; the dot says that it is all there.
publish() {
	local file=$1
	shift
	printf '%s\n' "$@" . >"$file"
}

# tell FILE prints what was published, once it is all there.
tell() {
	local text
	for _ in {1..500}; do
		text=$(<"$1")
		case $text in
		*.) printf '%s' "${text%.}"; return ;;
		esac
		sleep 0.01
	done
	echo "nothing is published in $1" >&2
	exit 1
}

# wrong FILE WHAT tells that the application found an error, and stays.
wrong() {
	echo "wrong: $2"
	publish "$1" "wrong=$2"
	exec sleep infinity
}

fail() {
	echo "$*" >&2
	exit 1
}

nonce() { cat /proc/sys/kernel/random/uuid; }

# get PORT PATH prints what an HTTP server on loopback answers.
get() {
	local line status
	exec 7<>"/dev/tcp/127.0.0.1/$1"
	printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&7
	read -r -t 30 status <&7
	[[ $status == *" 200"* ]] || fail "GET $2: $status"
	while read -r -t 30 line <&7 && [[ $line != $'\r' ]]; do :; done
	cat <&7
	exec 7>&-
}
