# Run a command where every user can reach this Python, whatever the home folder that it lies in
# allows: in a mount namespace of its own, whose /root is empty but for that Python.
# Arguments: the folder below /root that holds Python, then the command.
set -e
python=$1
shift
mount -t tmpfs tmpfs /mnt
aside=/mnt/python
mkdir $aside
mount --bind "$python" "$aside"
mount -t tmpfs -o mode=755 tmpfs /root
mkdir -p "$python"
mount --bind "$aside" "$python"
exec "$@"
