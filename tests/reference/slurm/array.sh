#!/bin/bash -l
#SBATCH --job-name=workers
#SBATCH --mem=4000
#SBATCH --time=90
#SBATCH --exclusive=user
#SBATCH --array=0-9%4
#SBATCH --requeue
#SBATCH --output=workers-%A_%a.out
#SBATCH --error=workers-%A_%a.error


cd -- '/scratch/it'"'"'s here/launcher_1' || exit 1

# SLURM's warnings reach only this shell, which would not look at them before its child
# ends: run it in the background and hand them on. The child stops with a checkpoint.
nanoos work -l my_launchpad.yaml &
rocket=$!
trap 'kill -USR1 "$rocket" 2>/dev/null' USR1 USR2 TERM
while kill -0 "$rocket" 2>/dev/null; do
  wait "$rocket"
done
wait "$rocket"
status=$?

exit "$status"
