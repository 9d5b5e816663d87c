#!/usr/bin/env bash
# Ray on several machines by hand: one head without trials, and any number of nodes that run them.
#
#   on the first machine:    ray_configs/clusters/nodes.sh head 192.168.0.10
#   on every machine:        ray_configs/clusters/nodes.sh node 192.168.0.10
#   anywhere, then:          gluonts-peft search SPEC --out /shared/runs/NAME --address 192.168.0.10:6379
#
# Each command stays in the foreground; Ctrl-C takes the node out of the cluster, its running trials go on elsewhere.
# The same environment with gluonts-peft is active everywhere, and /shared is mounted everywhere. Set RAY_AUTH_TOKEN to
# the same random word everywhere, the last command included; without it anybody who reaches the port can run code.
#
# Further arguments go to `ray start`: --num-cpus=8 --num-gpus=1, or --node-ip-address=... if the machine has several.
# PORT (6379) and PYTHON (python) are taken from the environment.
set -euo pipefail

usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
[ $# -ge 2 ] || usage
role=$1 head=$2
shift 2

export RAY_USAGE_STATS_ENABLED=0
if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
  export RAY_AUTH_MODE=token
else
  echo "warning: no RAY_AUTH_TOKEN is set: anybody who reaches ${head}:${PORT:-6379} can run code here" >&2
  export RAY_AUTH_MODE=disabled
fi

# A folder of its own, with a short name since sockets lie there: nodes that start at the same time do not meet.
folder=$(mktemp -d "${TMPDIR:-/tmp}/ray-XXXXXX")
trap 'rm -rf "$folder"' EXIT
ray=("${PYTHON:-python}" -m ray.scripts.scripts start --block --disable-usage-stats --temp-dir="$folder")

case $role in
  head) "${ray[@]}" --head --port="${PORT:-6379}" --node-ip-address="$head" --num-cpus=0 --num-gpus=0 \
          --include-dashboard=false "$@" & ;;
  node) "${ray[@]}" --address="$head:${PORT:-6379}" "$@" & ;;
  *) usage ;;
esac
child=$!
# A trap runs only when the shell is not waiting for a program in the foreground.
trap 'kill -TERM $child 2>/dev/null || true' INT TERM
status=0
while kill -0 $child 2>/dev/null; do wait $child && status=0 || status=$?; done
exit $status
