#!/bin/busybox sh
# /init of the guest with software RDMA. It loads modules, then mounts the host's files, read-only,
# under a layer in memory that takes writes.
set -u
b=/bin/busybox
die() {
    echo "rdma-guest: $*"
    echo c > /proc/sysrq-trigger # a panic, which rdma.py sees
}
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    $b insmod "$module" || die "cannot load $module"
done
transport=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o "$transport,ro,cache=loose" host /host || die "cannot mount the host's files"
$b mount -t tmpfs -o mode=755,size=75% tmpfs /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root || die "cannot layer the files"
for directory in proc sys dev; do
    $b mount --move "/$directory" "/root/$directory"
done
$b mkdir -p /root/dev/shm /root/dev/pts /root/mnt
$b mount -t tmpfs tmpfs /root/dev/shm
$b mount -t devpts devpts /root/dev/pts
$b mount -t tmpfs tmpfs /root/run
$b mount -t tmpfs tmpfs /root/mnt
$b mkdir /root/mnt/exchange
$b mount -t 9p -o "$transport,cache=none" exchange /root/mnt/exchange || die "cannot mount the exchange"
exec $b switch_root -c /dev/console /root /bin/sh /mnt/exchange/start
