#!/bin/sh
# Takes a picture of an HTML file with a headless Chromium.
#   hack/screenshot.sh PAGE.html PICTURE.png [WIDTH,HEIGHT]
set -eu

page=$(realpath "$1") picture=$2 size=${3:-1240,2260}
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
	--disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars \
	--window-size="$size" --screenshot="$picture" "file://$page" 2>"$profile/log" ||
	{ cat "$profile/log" >&2; exit 1; }
echo "$picture: $(stat -c %s "$picture") bytes"
