#!/bin/bash -l
${options}
#SBATCH --output=${output}.out
#SBATCH --error=${output}.error

${pre_rocket}
cd -- ${launch_dir} || exit 1

# SLURM's warnings reach only this shell, which would not look at them before its child
# ends: run it in the background and hand them on. The child stops with a checkpoint.
${rocket_launch} &
rocket=$$!
trap 'kill -USR1 "$$rocket" 2>/dev/null' USR1 USR2 TERM
while kill -0 "$$rocket" 2>/dev/null; do
  wait "$$rocket"
done
wait "$$rocket"
status=$$?
${post_rocket}
exit "$$status"
