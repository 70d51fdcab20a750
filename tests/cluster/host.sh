#!/usr/bin/env bash
# The first process of a simulated host: mounts the host's own folders, then becomes sshd.
# Arguments: host name, folder of the host, folder that all hosts share, then the paths under /tmp and the home
# folder that must stay visible.
set -euo pipefail
name=$1 folder=$2 shared=$3
shift 3

mount --make-rprivate /
hostname "$name"
mount -t proc proc /proc
mount -t tmpfs -o size=6g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
number=0
for path in "$@"; do
    number=$((number + 1))
    mkdir -p "$folder/kept/$number"
    mount --bind "$path" "$folder/kept/$number"
    mount -o remount,bind,ro "$folder/kept/$number"
done
mount --bind "$folder/tmp" /tmp
mount --bind "$folder/home" "$HOME"
mkdir -p /tmp/shared
mount --bind "$shared" /tmp/shared
mount --bind "$folder/hosts" /etc/hosts
number=0
for path in "$@"; do
    number=$((number + 1))
    mkdir -p "$path"
    mount --bind "$folder/kept/$number" "$path"
done
exec /usr/sbin/sshd -D -E "$folder/sshd.log" -f "$folder/sshd_config"
