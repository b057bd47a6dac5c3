#!/bin/bash -l
#SBATCH --job-name=small_train
#SBATCH --partition=gpu,long
#SBATCH --account=mat-42
#SBATCH --qos=high
#SBATCH --reservation=course
#SBATCH --nodes=2
#SBATCH --ntasks=8
#SBATCH --ntasks-per-node=4
#SBATCH --ntasks-per-core=1
#SBATCH --cpus-per-task=6
#SBATCH --core-spec=0
#SBATCH --gpus=a100:8
#SBATCH --gpus-per-node=a100:4
#SBATCH --gpus-per-task=1
#SBATCH --gpu-bind=closest
#SBATCH --gres=nvme:1
#SBATCH --mem-per-cpu=3900M
#SBATCH --time=1-12:00:00
#SBATCH --time-min=4:00:00
#SBATCH --exclusive
#SBATCH --nodelist=n[1-4]
#SBATCH --exclude=n[7,9-11]
#SBATCH --constraint=[rack1|rack2]&intel
#SBATCH --licenses=vasp:2
#SBATCH --dependency=afterok:123:124
#SBATCH --begin=now+1hour
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --mail-type=FAIL
#SBATCH --mail-user=someone@example.org
#SBATCH --comment="first batch of #7"
#SBATCH --image=docker:repo/image:1.0
#SBATCH --volume=/scratch:/data
#SBATCH --output=small_train-%j.out
#SBATCH --error=small_train-%j.error

module load mpi
export A='b c'
cd -- '/scratch/it'"'"'s here/launcher_1' || exit 1

# SLURM's warnings reach only this shell, which would not look at them before its child
# ends: run it in the background and hand them on. The child stops with a checkpoint.
rlaunch -c '/home/a b/cluster' singleshot --fw_id 7 &
rocket=$!
trap 'kill -USR1 "$rocket" 2>/dev/null' USR1 USR2 TERM
while kill -0 "$rocket" 2>/dev/null; do
  wait "$rocket"
done
wait "$rocket"
status=$?
echo done
exit "$status"
