#!/bin/busybox sh
# Runs the host's commands, one after the other.
#
# Port vblklab.agent, host to guest:  "run ID SCRIPT_BYTES INPUT_BYTES\n" script input     "mark ID\n"
#                     guest to host:  "ID STATUS OUTPUT_BYTES\n" output
# Port vblklab.kill, host to guest:   "ID GRACE_S\n" ends the command ID; if a process of it is beyond killing (it waits for a
#                                     disk), the agent answers with status "lost" all the same and goes on without it.
cd /root || exit
mkdir -p /run/vblk /run/user
marker=/sys/kernel/tracing/trace_marker

port() { # the device of the port with that name, when it has come
    while :; do
        for folder in /sys/class/virtio-ports/*; do
            if [ -r "$folder/name" ] && read -r name <"$folder/name" && [ "$name" = "$1" ]; then
                found=/dev/${folder##*/}
                [ -c "$found" ] && return
            fi
        done
        usleep 10000
    done
}

killer() { # for as long as the host is there
    while read -r id grace <&4; do
        read -r current child 2>/dev/null </run/vblk/current || continue
        [ "$current" = "$id" ] || continue
        kill -KILL -- "-$child" 2>/dev/null
        sleep "$grace"
        read -r current child 2>/dev/null </run/vblk/current || continue
        [ "$current" = "$id" ] && kill -USR1 1
    done
}

receive() { # FILE BYTES: exactly so many from the host
    : >"$1"
    [ "$2" = 0 ] || dd of="$1" bs=64k count="$2" iflag=count_bytes,fullblock 2>/dev/null <&3
}

run() { # ID
    out=/run/vblk/out.$1
    setsid sh /run/vblk/script </run/vblk/input >"$out" 2>&1 3>&- 4>&- &
    child=$!
    echo "$1 $child" >/run/vblk/current
    lost=
    wait $child
    status=$?
    while [ -z "$lost" ] && kill -0 $child 2>/dev/null; do
        wait $child
        status=$?
    done
    rm /run/vblk/current
    bytes=$(stat -c %s "$out")
    echo "$1 ${lost:-$status} $bytes" >&3
    [ "$bytes" = 0 ] || dd if="$out" bs=64k count="$bytes" iflag=count_bytes 2>/dev/null >&3
    rm "$out"
}

port vblklab.kill
exec 4<>"$found"
port vblklab.agent
exec 3<>"$found"
trap 'lost=lost' USR1
killer 3>&- &
exec </dev/null
echo "vblklab: ready"
echo "0 0 0" >&3
while read -r verb id script_bytes input_bytes <&3; do
    case $verb in
    run)
        receive /run/vblk/script "$script_bytes"
        receive /run/vblk/input "$input_bytes"
        run "$id"
        ;;
    mark)
        echo "vblk $id" >$marker
        echo "$id 0 0" >&3
        ;;
    esac
done
poweroff -f # the host is gone
