#!/bin/bash
# A train stage of one round: the tasks of the step are the learner's ranks. What stands between
# @@{ and } is filled in by 'opdcache submit slurm'; @@@@ is one @@.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{ranks}
#SBATCH --output=@{log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@@@{warn_s}
@{options}

@{setup}
@{threads}
# srun tells the largest of its tasks' exit codes, and those that lost another end with 75: the one
# that cannot succeed later leaves its own.
export FAULT=@{fault}
rm -f "$FAULT"
srun --kill-on-bad-exit=1 bash -c '
    trap : USR1 TERM # for the command, which is waited for
    "$@"
    code=$?
    ((code == 0 || code == 75 || code > 128)) || echo $code > "$FAULT"
    exit $code
' rank @{command}
code=$?
if [ -s "$FAULT" ]; then code=$(cat "$FAULT"); fi

# 75: the same command may succeed later; above 128: a signal ended it. Slurm itself requeues only
# after a lost node or a preemption.
if ((code == 75 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < @{max_requeues})); then
    for pause in 1 5 20 60 60 0; do # the controller may be away
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        sleep $pause
    done
fi
exit $code
