#!/bin/bash -l
#SBATCH --job-name=FW_job
#SBATCH --output=FW_job-%j.out
#SBATCH --error=FW_job-%j.error


cd -- '/scratch/it'"'"'s here/launcher_1' || exit 1

# SLURM's warnings reach only this shell, which would not look at them before its child
# ends: run it in the background and hand them on. The child stops with a checkpoint.
rlaunch singleshot &
rocket=$!
trap 'kill -USR1 "$rocket" 2>/dev/null' USR1 USR2 TERM
while kill -0 "$rocket" 2>/dev/null; do
  wait "$rocket"
done
wait "$rocket"
status=$?

exit "$status"
