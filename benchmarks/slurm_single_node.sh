#!/usr/bin/env bash
# The workflow under a real Slurm on this one machine (Debian 12, as root), with two of
# its jobs killed half-way; docs/scaling.md shows what it prints.
#
#   pip install -e '.[slurm]'
#   bash benchmarks/slurm_single_node.sh [FOLDER]
#
# Installs Debian's slurm-wlm if it is missing, starts a cluster of one node with two
# made-up GPUs and stops it at the end. All its files are in FOLDER, but for a link at
# /etc/slurm/slurm.conf, where a job looks once the variable SLURM_CONF is gone.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(realpath -m "${1:-results/slurm_single_node}")
python=${PYTHON:-python}
parts=4
change="store.rows_per_block=1024 splits.train.limit=1200 splits.test.limit=300"
node=$(hostname -s)
conf=/etc/slurm/slurm.conf
export OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }

install() {
  command -v slurmctld slurmd munged > /dev/null && return
  apt-get update > /dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    slurm-wlm munge > /dev/null
}

configure() {
  if [ -e $conf ]; then
    echo "$conf exists: this machine has a Slurm already, which is left alone." >&2
    exit 2
  fi
  mkdir -p "$work"/slurm/{state,spool}
  # A GPU is a file to Slurm; jobs are counted against these two.
  touch "$work"/slurm/gpu{0,1}
  echo "NodeName=$node Name=gpu File=$work/slurm/gpu[0-1]" > "$work/slurm/gres.conf"
  # Without cgroups, so that it runs inside a container as well.
  cat > "$work/slurm/slurm.conf" << END
ClusterName=single
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/slurm/state
SlurmdSpoolDir=$work/slurm/spool
SlurmctldPidFile=$work/slurm/slurmctld.pid
SlurmdPidFile=$work/slurm/slurmd.pid
SlurmctldLogFile=$work/slurm/slurmctld.log
SlurmdLogFile=$work/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MinJobAge=3600
KillWait=5
ReturnToService=2
MpiDefault=none
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
END
  mkdir -p /etc/slurm
  ln -s "$work/slurm/slurm.conf" $conf
  ln -sf "$work/slurm/gres.conf" /etc/slurm/gres.conf
  trap stop EXIT
}

stop() {
  for daemon in slurmd slurmctld; do
    [ ! -f "$work/slurm/$daemon.pid" ] || kill "$(cat "$work/slurm/$daemon.pid")"
  done
  rm -f $conf /etc/slurm/gres.conf
  # Who waits for a chance to kill waits in vain after a failure.
  [ -z "$(jobs -p)" ] || kill $(jobs -p)
}

start() {
  if ! munge -n > /dev/null 2>&1; then
    install -d -o munge -g munge /run/munge
    if [ ! -f /etc/munge/munge.key ]; then
      (umask 077 && head -c 1024 /dev/urandom > /etc/munge/munge.key)
      chown munge:munge /etc/munge/munge.key
    fi
    setpriv --reuid munge --regid munge --clear-groups munged
  fi
  slurmctld
  slurmd
  until sinfo -h -t idle | grep -q main; do sleep 1; done
  sinfo -o '%P %D %T %c CPUs %m MB %G'
}

# All files of a store and their SHA-256.
digests() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }

committed() { find caches/demo.zarr -path '*/index/commit/c/*' -type f 2> /dev/null | wc -l; }

# Running jobs that fill parts, as JOB RULE.
running() { squeue -h -t R -o '%i %k' | grep part_demo || true; }

# Once a few blocks are done, both jobs at work are ended by force.
kill_two() {
  local jobs=""
  until [ "$(committed)" -ge 3 ] && [ "$(wc -l <<< "$jobs")" -ge 2 ]; do
    sleep 0.2
    jobs=$(running)
  done
  local first second
  first=$(awk 'NR == 1 {print $1}' <<< "$jobs")
  second=$(awk 'NR == 2 {print $1}' <<< "$jobs")
  say "with $(committed) blocks done: scancel of job $first, kill -9 in job $second"
  scancel "$first"
  # shellcheck disable=SC2046  # one process id a word
  kill -9 $(scontrol listpids "$second" | awk 'NR > 1 && $1 > 0 {print $1}')
}

if [ -e "$work" ] && [ ! -d "$work/slurm" ]; then
  echo "$work exists and was not made by this script; choose another folder." >&2
  exit 2
fi
install
rm -rf "$work"
mkdir -p "$work"
cd "$work"
ln -s "$root/Snakefile" "$root/pipeline" "$root/cache_specs" .
configure
say "Slurm $(slurmctld -V)"
start

say "one process on this machine, for comparison"
# shellcheck disable=SC2086  # one change a word
kd-cache build cache_specs/demo.yaml --out caches/demo.zarr --set ${change// / --set } \
  --threads 1 --device cpu 2> local.log || { cat local.log; exit 1; }
digests caches/demo.zarr > local.sha256
mv caches/demo.zarr local.zarr

say "the same through Slurm, in $parts parts"
kill_two &
"$python" -m snakemake --profile pipeline/profiles/slurm cache_demo \
  --config jobs=$parts set="$change" cpus=1 mem_mb=1500 runtime=20 \
  --default-resources mem_mb=1000 runtime=20 \
  --slurm-status-command squeue \
  --slurm-init-seconds-before-status-checks 5 --seconds-between-status-checks 5 \
  > snakemake.log 2>&1 || { tail -n 40 snakemake.log; exit 1; }
wait %1
grep -E '^Job [0-9]+ has been submitted|Error in rule|Trying to restart|steps.*done' \
  snakemake.log | sed "s|$work/||"

say "jobs as Slurm saw them"
squeue -t all -S i -O "jobid:7,state:12,timeused:10,tres-per-job:14,comment:60"

say "what Snakemake measured (last attempts)"
cut -f 1,2,4,10 results/caches/demo.jobs.tsv

say "what the attempts at parts found to do, one after the other"
grep -o '[0-9]* blocks to do' caches/demo.zarr.log | tail -n +2

say "the store"
cat results/caches/demo.log
digests caches/demo.zarr > slurm.sha256
cmp local.sha256 slurm.sha256
echo "all $(wc -l < slurm.sha256) files are those of one process, byte for byte"
