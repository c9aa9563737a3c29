# Functions that scripts/slurm.sh sources: a private Slurm in a folder of its own, started and stopped.
# shellcheck shell=bash
# start_cluster exports SLURM_CONF, by which clients find it.
: "${folder:?the temporary folder, which the sourcing script makes and removes}"

PACKAGES=(munge slurmctld slurmd slurm-client)
PROGRAMS=(munged slurmctld slurmd sbatch)
daemons=()

# Say what went wrong in one line, and leave.
fail() {
  echo "slurm.sh: error: $*" >&2
  exit 1
}

# Install what is missing of Debian's packages.
need_packages() {
  PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps daemons; not on every user's PATH
  type -P "${PROGRAMS[@]}" > /dev/null && return
  local wanted="apt-get install ${PACKAGES[*]}"
  type -P apt-get > /dev/null || fail "Slurm is missing and this is no Debian; install ${PACKAGES[*]}"
  [[ $EUID == 0 ]] || fail "Slurm is missing and only root can install it; run as root: $wanted"
  echo "installing ${PACKAGES[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install --yes --no-install-recommends "${PACKAGES[@]}"; } > "$folder/apt.log" 2>&1 ||
    fail "'$wanted' failed: $(tail -n 1 "$folder/apt.log")"
}

# Refuse to run beside a Slurm that is not ours.
refuse_second_slurm() {
  local name
  for name in slurmctld slurmd; do
    ! pgrep -x "$name" > /dev/null || fail "$name is already running here; stop it, or submit to it with profiles/slurm"
  done
}

# Print some free TCP ports: free_ports COUNT
free_ports() {
  python3 -c 'import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))' "$1"
}

# Start a daemon in the foreground of a background job, so that its process is known: start NAME COMMAND...
start() {
  local name=$1
  shift
  "$@" > "$folder/$name.out" 2>&1 &
  daemons+=("$!")
}

# Wait for a command to succeed, for at most 30 seconds: wait_for WHAT COMMAND...
wait_for() {
  local what=$1 deadline=$((SECONDS + 30))
  shift
  until "$@" > /dev/null 2>&1; do
    ((SECONDS < deadline)) || fail "waited 30 s in vain for $what"
    sleep 0.2
  done
}

# Ask whether so many nodes, and no others, are idle: all_idle COUNT
all_idle() {
  [[ "$(sinfo --noheader --Node --format=%T | grep -c '^idle$')" == "$1" ]]
}

# Start munged, slurmctld and a slurmd for each node, below $folder: start_cluster NODES CPUS-OF-EACH
start_cluster() {
  local nodes=$1 cpus=$2 host memory ports index
  host=$(hostname -s)
  memory=$(awk -v nodes="$nodes" '/^MemTotal:/ {print int($2 / 1024 / nodes)}' /proc/meminfo)
  read -ra ports < <(free_ports $((nodes + 1)))
  # munged wants its socket where everybody can get at it, and its key where nobody can.
  chmod 755 "$folder"
  mkdir -m 755 "$folder"/{munge,state,bin}
  (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
  {
    sed -e "s|@FOLDER@|$folder|g; s|@HOST@|$host|g; s|@USER@|$(id -un)|g; s|@CONTROLLER_PORT@|${ports[0]}|g" \
      "$(dirname "${BASH_SOURCE[0]}")/slurm.conf.in"
    for ((index = 1; index <= nodes; index++)); do
      echo "NodeName=node$index NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[index]} CPUs=$cpus RealMemory=$memory"
    done
    echo "PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
  } > "$folder/slurm.conf"
  export SLURM_CONF=$folder/slurm.conf
  # The plugin's job step clears every SLURM_ variable before it calls srun, which would then look in /etc/slurm.
  printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$(type -P srun)" > "$folder/bin/srun"
  chmod +x "$folder/bin/srun"
  PATH="$folder/bin:$PATH"
  start munged munged --foreground --key-file "$folder/munge.key" --socket "$folder/munge/socket" \
    --pid-file "$folder/munge/pid" --log-file "$folder/munged.log" --seed-file "$folder/munge/seed"
  wait_for "munged" test -S "$folder/munge/socket"
  start slurmctld slurmctld -D
  wait_for "slurmctld" scontrol ping
  for ((index = 1; index <= nodes; index++)); do
    start "slurmd-node$index" slurmd -D -N "node$index"
  done
  wait_for "the nodes to be idle" all_idle "$nodes"
}

no_job_is_left() {
  [[ -z "$(squeue --noheader)" ]]
}

# Cancel what still runs, and end the daemons that this script started, the youngest first.
stop_cluster() {
  local index
  if ((${#daemons[@]} > 2)); then
    scancel --quiet --user "$(id -un)" || true
    (wait_for "cancelled jobs" no_job_is_left) || true
  fi
  for ((index = ${#daemons[@]} - 1; index >= 0; index--)); do
    kill "${daemons[index]}" 2> /dev/null || true
    wait "${daemons[index]}" 2> /dev/null || true
  done
  daemons=()
}

# Print the last lines of the daemons' logs and of the jobs that failed (the plugin deletes those of the others).
show_logs() {
  local log
  while read -r log; do
    echo "--- ${log#"$folder/"}"
    tail -n 15 "$log"
  done < <(find "$folder" -size +0 \( -name 'munged.out' -o -name 'slurm*.out' -o -path '*/slurm_logs/*.log' \) | sort)
}
