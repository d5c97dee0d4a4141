#!/usr/bin/env bash
# launch/multinode.sh [options] HOSTFILE [arguments of pretrain.py]
#
# Checks the nodes (launch/doctor.py), starts the DeepSpeed launcher on each over ssh, and starts the run again from its
# last checkpoint when it fails. Logs are in the run folder, one a node. SIGTERM or Ctrl-C: checkpoint and end, status
# 143; SIGUSR1: checkpoint and go on. Options: launch/multinode.sh --help
set -euo pipefail
exec "${PYTHON:-python}" -m aclip.nodes.supervisor --script "$(cd "$(dirname "$0")" && pwd)/pretrain.py" "$@"
