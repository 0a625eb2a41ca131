# Makes the namespaces that it is started in the inside of a pod, and stays as the pod's process 1 until its stdin
# ends. Programs are named by their full paths, because the environment is the pod's own.
set -e
root=$1 fstab=$2 mount=$3 umount=$4 pivot_root=$5 env=$6 cat=$7
shift 7
# A root must be a mount of its own before it can be changed to.
"$mount" -n --rbind "$root" "$root"
"$mount" -n -a -T "$fstab"
# What the machine has mounted below the folders it lends came along writable. A mount that forbids execution has to
# keep that.
for below in "$@"; do
  "$mount" -n -o remount,bind,ro,nosuid,nodev "$root$below" 2>/dev/null ||
    "$mount" -n -o remount,bind,ro,nosuid,nodev,noexec "$root$below"
done
cd "$root"
"$pivot_root" . .
"$umount" -n -l .
cd /
echo ready
# With SIGCHLD ignored the kernel itself clears away what other processes leave behind.
exec "$env" -u OLDPWD --ignore-signal=CHLD "$cat" >/dev/null 2>&1
