#!/bin/busybox sh
# First process of the test machine: the host's files, read-only, below a layer in memory; then the given command; then off.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module" || echo "vm: cannot load $module"
done
nine=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o "ro,cache=loose,$nine" host /host || echo "vm: no host files"
$b mount -t 9p -o "rw,$nine" share /share || echo "vm: no share"
$b mount -t tmpfs -o size=2g rw /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /new || echo "vm: no overlay"
for folder in dev proc sys; do
    $b mkdir -p "/new/$folder"
    $b mount --move "/$folder" "/new/$folder"
done
$b mount -t tmpfs -o mode=1777 tmp /new/tmp
$b mount -t tmpfs run /new/run
$b mkdir -p /new/run/farshore-vm /new/run/lock /new/dev/shm /new/dev/pts /new/lib/modules
$b mount -t tmpfs -o mode=1777 shm /new/dev/shm
$b mount -t devpts pts /new/dev/pts
$b mount --move /share /new/run/farshore-vm
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TERM=${TERM:-dumb}
# As the first process itself, so that the kernel finds modprobe. The console takes what the command says; its result goes
# through the share, which no kernel message can garble.
exec $b switch_root /new /bin/sh -c '
    # As systemd leaves it: namespaces see what is mounted later.
    mount --make-rshared /
    ip link set lo up
    . /run/farshore-vm/environment
    mkdir -p "/lib/modules/$(uname -r)" && mount --bind "$VM_MODULES" "/lib/modules/$(uname -r)"
    modprobe virtio_blk || echo "vm: no disks"
    cd "$VM_FOLDER"
    # Also where the runner is gone. What hangs is in the log then.
    (
        sleep "$VM_SECONDS"
        echo w >/proc/sysrq-trigger
        dmesg >/run/farshore-vm/dmesg
        sync
        echo o >/proc/sysrq-trigger
    ) &
    if [ -e /run/farshore-vm/interactive ]; then
        setsid --ctty sh -c "exec bash -i <>/dev/ttyS0 >&0 2>&1"
    else
        sh /run/farshore-vm/command </dev/null
    fi
    code=$?
    dmesg >/run/farshore-vm/dmesg
    echo $code >/run/farshore-vm/exit
    sync
    echo o >/proc/sysrq-trigger
    while :; do :; done'
