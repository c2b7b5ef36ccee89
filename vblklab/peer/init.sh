#!/bin/busybox sh
# The first process of the guest: mounts, modules, then the agent takes its place.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=linux LD_LIBRARY_PATH=/lib/vblk
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs -o size=25% tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
echo "vblklab: mounted"
while read -r module; do
    insmod "/modules/$module" || echo "vblklab: module $module does not load"
done </modules/order
echo "vblklab: modules loaded"
exec /bin/busybox sh /agent
