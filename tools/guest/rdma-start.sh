#!/bin/sh
# The first process on the host's files: it sets up a network with software RDMA, then runs the
# command. WIRE and ADDRESS come from the kernel's command line, as environment variables.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ulimit -l unlimited
stty -F /dev/console -onlcr
ip link set lo up
if [ -n "${WIRE:-}" ]; then
    card=$(basename "$(dirname "$(ls -d /sys/class/net/*/device | head -n 1)")")
    ip link set "$card" name eth0
else
    ip link add eth0 type dummy
fi
# RoCE puts a power of two below the MTU into each packet: 4500 gives the largest, 4096.
ip link set eth0 mtu 4500
ip address add "${ADDRESS:-10.77.0.1}/24" dev eth0
ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0 || dmesg | tail -n 5
/mnt/exchange/command < /dev/null
echo $? > /mnt/exchange/status
sync
printf '\001' | dd of=/dev/port bs=1 seek=244 conv=notrunc status=none # isa-debug-exit: QEMU ends at once
echo o > /proc/sysrq-trigger
sleep 10
