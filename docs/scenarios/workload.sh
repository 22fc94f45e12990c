#!/bin/sh
# Stands for a workload: 64 MiB are written, read and removed. The guest's disk is its memory.
set -e
cd /mnt
dd if=/dev/zero of=scratch bs=1M count=64
md5sum scratch
rm scratch
