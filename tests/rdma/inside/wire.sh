#!/bin/sh
# up: RDMA devices rxea (10.88.0.1) and rxeb (10.88.0.2) on the ends of a virtual wire, in one network namespace, since rdma_rxe
# hears the first one alone. What goes from one to the other is made to take the wire, which is bad. down: as before.
set -eu
if [ "$1" = down ]; then
    ip link delete va
    ip rule add pref 0 lookup local
    for rule in 10 11 12 13 20; do
        ip rule delete pref $rule
    done
    exit
fi
ip link add va type veth peer name vb
for end in va:10.88.0.1 vb:10.88.0.2; do
    device=${end%%:*}
    ip link set "$device" mtu 4500
    ip address add "${end#*:}/32" dev "$device"
    ip link set "$device" up
    echo 1 > "/proc/sys/net/ipv4/conf/$device/accept_local"
    echo 0 > "/proc/sys/net/ipv4/conf/$device/rp_filter"
done
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
# Local is only what has come over the wire.
ip rule add pref 10 iif va lookup local
ip rule add pref 11 iif vb lookup local
ip rule add pref 12 to 10.88.0.2 lookup 100
ip rule add pref 13 to 10.88.0.1 lookup 101
ip rule add pref 20 lookup local
ip rule delete pref 0
ip route add 10.88.0.2/32 dev va src 10.88.0.1 table 100
ip route add 10.88.0.1/32 dev vb src 10.88.0.2 table 101
ip neigh add 10.88.0.2 lladdr "$(cat /sys/class/net/vb/address)" dev va
ip neigh add 10.88.0.1 lladdr "$(cat /sys/class/net/va/address)" dev vb
rdma link add rxea type rxe netdev va
rdma link add rxeb type rxe netdev vb
tc qdisc add dev va root netem delay 5ms loss 1%
tc qdisc add dev vb root netem delay 5ms loss 1%
