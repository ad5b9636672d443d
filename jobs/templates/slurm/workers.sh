#!/bin/bash
# A rollout or score stage of one round: the tasks of the array share its shards. What stands
# between @@{ and } is filled in by 'opdcache submit slurm'; @@@@ is one @@.
#SBATCH --job-name=@{name}
#SBATCH --array=0-@{last}
#SBATCH --ntasks=1
#SBATCH --output=@{log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@@@{warn_s}
@{options}

@{setup}
@{threads}
srun --ntasks=1 @{command}
code=$?

# 75: the same command may succeed later; above 128: a signal ended it. Slurm itself requeues only
# after a lost node or a preemption.
# One task's SLURM_JOB_ID may be that of the whole array.
if ((code == 75 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < @{max_requeues})); then
    for pause in 1 5 20 60 60 0; do # the controller may be away
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" && exit 0
        sleep $pause
    done
fi
exit $code
