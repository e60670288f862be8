#!/bin/sh
# Runs a program in an emulated machine: Debian trixie with its own kernel, systemd as init
# and cgroups of version 2 alone, as most nodes are and this machine need not be. It needs no
# help of this machine's processor and is ten times slower than that.
# It has two processors, 4 GiB of memory and no network, and nothing of it stays but its disk
# in the cache.
#
#   hack/emulated.sh TREE SECONDS
#
#   TREE      is /given in it; TREE/start is the shell script that is run
#   SECONDS   after which it is ended
#
# Prints what TREE/start prints, and ends as that does: 0, or 1.
set -eu

fail() { echo "emulated: $*" >&2; exit 1; }

[ $# = 2 ] && [ -f "$1/start" ] || fail "usage: $0 TREE SECONDS; TREE/start is what is run"
tree=$1
seconds=$2
for tool in qemu-system-x86_64:qemu-system-x86 debootstrap:debootstrap mke2fs:e2fsprogs; do
	command -v "${tool%:*}" >/dev/null || fail "${tool%:*} is missing: apt-get install --no-install-recommends ${tool#*:}"
done
[ "$(dpkg --print-architecture)" = amd64 ] || fail "only machines of amd64 are emulated"

cached=${STASIS_CACHE:-${HOME:?HOME is not set}/.cache/stasis}/emulated
key=$(cat "$0" "$(dirname "$0")/apt.sh" | sha256sum | cut -c1-16)
disk=$cached/$key
work=
cleanup() { [ -z "$work" ] || rm -rf --one-file-system "$work"; }
trap cleanup EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$cached"
work=$(mktemp -d "$cached/tmp.XXXXXX")

# image DIR FILE SIZE makes a disk of a directory.
image() { mke2fs -q -t ext4 -d "$1" -O ^has_journal,^metadata_csum -m 0 "$2" "$3" >"$work/log" 2>&1 || fail "making a disk of $1: $(tail -n1 "$work/log")"; }

build() {
	# shellcheck source=hack/apt.sh
	. "$(dirname "$0")/apt.sh"
	apt_begin "$work/apt" "$work/log" trixie # its kernel has all that Stasis uses (PAGEMAP_SCAN is of Linux 6.7)
	root=$work/root
	debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,linux-image-cloud-amd64,initramfs-tools,udev,kmod,busybox-static,containernetworking-plugins,nftables,iproute2,procps \
		"$suite" "$root" "$apt_main" >"$work/log" 2>&1 || fail "debootstrap: $(grep '^E:' "$work/log" || tail -n1 "$work/log")"
	printf '%s\n' '/dev/vda / ext4 rw,noatime 0 0' '/dev/vdb /given ext4 rw,noatime 0 0' >"$root/etc/fstab"
	mkdir -p "$root/given"
	echo emulated >"$root/etc/hostname"
	: >"$root/etc/machine-id"
	# What else loads when it is first used, and cannot be seen before. The second half are
	# what CRIU asks for sockets.
	printf '%s\n' overlay veth bridge br_netfilter nf_tables nft_masq nft_ct nft_reject_inet \
		unix_diag inet_diag tcp_diag udp_diag raw_diag netlink_diag af_packet_diag >"$root/etc/modules-load.d/emulated.conf"
	units=$root/etc/systemd/system
	for unit in systemd-timesyncd.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer e2scrub_reap.service; do
		ln -sf /dev/null "$units/$unit"
	done
	cat >"$units/emulated.service" <<-EOF
		[Unit]
		Description=What this machine was started for
		RequiresMountsFor=/given
		After=multi-user.target
		[Service]
		Type=oneshot
		Environment=HOME=/root
		ExecStart=/bin/sh -c '/bin/sh /given/start && echo ended well >/dev/virtio-ports/ended'
		StandardOutput=file:/dev/virtio-ports/out
		StandardError=inherit
		ExecStopPost=/bin/systemctl poweroff --no-block
		TimeoutStartSec=infinity
	EOF
	mkdir -p "$units/multi-user.target.wants"
	ln -s ../emulated.service "$units/multi-user.target.wants/emulated.service"
	rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
	mkdir "$work/disk"
	cp -L "$root/vmlinuz" "$root/initrd.img" "$work/disk/"
	image "$root" "$work/disk/root" 8G
	rm -rf --one-file-system "$root"
	mv -T "$work/disk" "$disk" 2>/dev/null || [ -f "$disk/root" ] || fail "cannot move the disk to $disk"
}
[ -f "$disk/root" ] || build

image "$tree" "$work/tree" 4G
: >"$work/out"
tail -f --pid=$$ "$work/out" 2>/dev/null &
tail=$!
# What is written to its disks goes to files that have no name, and with it.
timeout -k 5 "$seconds" nice -n 19 qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -machine q35,smm=off -accel tcg,thread=multi -cpu max,la57=off -smp 2 -m 4096 \
	-kernel "$disk/vmlinuz" -initrd "$disk/initrd.img" -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 no_timer_check mitigations=off" \
	-drive "file=$disk/root,if=none,id=root,format=raw,snapshot=on,cache=unsafe" -device virtio-blk-pci,drive=root \
	-drive "file=$work/tree,if=none,id=tree,format=raw,snapshot=on,cache=unsafe" -device virtio-blk-pci,drive=tree \
	-device virtio-serial-pci -chardev "file,id=out,path=$work/out" -device virtserialport,chardev=out,name=out \
	-chardev "file,id=ended,path=$work/ended" -device virtserialport,chardev=ended,name=ended \
	-device virtio-rng-pci -serial "file:$work/console" -monitor none >"$work/log" 2>&1 &
machine=$!
trap 'kill $machine 2>/dev/null; exit 1' HUP INT TERM
code=0
wait "$machine" || code=$?
trap 'exit 1' HUP INT TERM
sleep 1
kill "$tail" 2>/dev/null || true
wait "$tail" 2>/dev/null || true
[ "$code" != 124 ] && [ "$code" != 137 ] || fail "it had not ended after $seconds s; its console's last line: $(tail -n1 "$work/console")"
[ "$code" = 0 ] || fail "qemu ended with $code: $(tail -n1 "$work/log")"
[ -s "$work/ended" ] || {
	why=$(grep -a -m 1 -E 'Kernel panic|BUG:|Oops|Out of memory|oom-kill' "$work/console" || true)
	[ -z "$why" ] || fail "its kernel says: $why"
	[ -s "$work/out" ] || fail "it ended before anything ran in it"
	exit 1
}
