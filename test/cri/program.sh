#!/bin/sh
# Builds a program that tests of the CRI layer run in containers.
#   test/cri/program.sh hammer|weaver|wire FILE
set -eu
file=$(realpath -m "$2")
cd "$(dirname "$0")/$1"
if [ -e main.go ]; then
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$file" .
else
	cc -static -O2 -Wall -Wextra -Werror -pthread -o "$file" "$1.c"
fi
