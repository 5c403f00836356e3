
# Below is scripts/slurm/job.sh, the same for every job.
set -u # no -e: what fails is looked at

say() { echo "[$(date '+%F %T')] $*"; }

stop() { # the job ends here, and is not requeued
    say "stopped: $*"
    exit 1
}

newest_step() { # of the complete checkpoints in output_dir; 0 if there are none
    local complete step newest=0
    for complete in "$output_dir"/checkpoint-*/COMPLETE.json; do
        step=${complete%/COMPLETE.json}
        step=${step##*/checkpoint-}
        if [ -f "$complete" ] && [ "$step" -gt "$newest" ]; then newest=$step; fi
    done
    echo "$newest"
}

in_outcome() { # the value of key $1 in outcome.json, which the trainer writes at its end; nothing if it was killed
    [ -f "$output_dir/outcome.json" ] &&
        python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]] or "")' \
            "$output_dir/outcome.json" "$1"
}

# The warning before the end of the time, and SIGTERM (scancel, preemption), only leave a file that the trainer looks
# for: it saves and ends by itself. Nothing here signals the launcher, which would kill its processes half-way.
stop_file=$output_dir/stop-$SLURM_JOB_ID
rm -f "$stop_file" # of an attempt before this one
trap 'say "warned by SIGUSR1: the trainer saves and stops"; touch "$stop_file"' USR1
trap 'say "told to end by SIGTERM: the trainer saves if there is time"; touch "$stop_file"' TERM

# What follows from the job: printed once, here.
job=$SLURM_JOB_ID # squeue and scontrol take the id of an array's last task for all of the array
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
restarts=${SLURM_RESTART_COUNT:-0}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node have different ones
ends=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs "$job" --format %e)
if ends_at=$(date --date "${ends:-unknown}" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$ends_at; fi
export MASTER_ADDR MASTER_PORT
# Since Slurm 22.05 srun doesn't take over --cpus-per-task, and would leave one core to each node's processes.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
start_step=$(newest_step)
say "job $job, restart $restarts of at most $max_restarts, on $SLURM_JOB_NODELIST until ${ends:-unknown}"
say "first node $MASTER_ADDR, port $MASTER_PORT; output_dir $output_dir, newest complete checkpoint: step $start_step"

# A crash loop ends here too, as Slurm requeues by itself where a node fails: each attempt must begin further on than
# the one before it did.
attempts=$output_dir/slurm-$SLURM_JOB_ID.attempts # the step at which each attempt began
if [ "$restarts" -gt "$max_restarts" ]; then stop "requeued $restarts times, and --max-restarts is $max_restarts"; fi
if [ -s "$attempts" ] && [ "$start_step" -le "$(tail -n 1 "$attempts")" ]; then
    stop "no progress: the attempt before this one began at step $start_step too. Mend what fails and submit again"
fi

# Preflight: all nodes have the same code, see the same disk, have free GPUs, and reach each other.
TORCH_CPP_LOG_LEVEL=ERROR srun --kill-on-bad-exit=1 \
    python "$checkout/scripts/slurm/node_check.py" --gpus "$gpus" "${recipe[@]}" ||
    stop "the preflight failed, see above"

echo "$start_step" >>"$attempts"
# What an earlier attempt says there is not of this one. That of a finished run stays: the trainer looks for it, and has
# nothing to do where it is this recipe's.
if [ "$(in_outcome outcome)" != finished ]; then rm -f "$output_dir/outcome.json"; fi
# One launcher on each node. The single quotes leave $SLURM_NODEID to that node: here it is always 0 (accelerate#2816).
# The launcher is deaf to Slurm's SIGTERM, which reaches the trainer too: it would end at once, and the trainer with it.
export PET_SIGNALS_TO_HANDLE=SIGINT # of those that torchrun acts on
srun --kill-on-bad-exit=1 bash -c 'trap "" TERM; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' node \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "${launch[@]}" \
    "$checkout/train/sft.py" "${recipe[@]}" "${training[@]}" &
launched=$!
while kill -0 $launched 2>/dev/null; do wait $launched; done # a signal ends `wait`, not what it waits for
wait $launched
code=$? # bash remembers it

outcome=$(in_outcome outcome)
if [ "$outcome" = finished ] && [ "$code" -ne 0 ] && [ ! "$output_dir/outcome.json" -nt "$attempts" ]; then
    outcome=failed # an earlier attempt was finished, and this one ended before it could say otherwise
fi
reason=$(in_outcome reason)
reached=$(newest_step)
trap - USR1 TERM
rm -f "$stop_file"
say "training ${outcome:-was killed or crashed}${reason:+ ($reason)}; newest complete checkpoint: step $reached"
if [ "$outcome" = finished ]; then exit 0; fi
# `crashed`, or nothing at all: as after a node that failed, another attempt may go well, if this one got further.
if [ "$outcome" = failed ] || [ "$outcome" = interrupted ]; then
    stop "mend what failed and submit again: it goes on from step $reached"
fi
if [ "$outcome" = preempted ] && [ "$reason" = "the file stop" ]; then
    say "not requeued, as $output_dir/stop asked for it. Submit again to go on from step $reached"
    exit 0
fi
state=$(squeue --noheader --jobs "$job" --format %T)
if [ "$state" != RUNNING ]; then stop "Slurm ends this job (${state:-it is gone}); a requeue would be its own"; fi
if [ "$reached" -le "$start_step" ]; then
    stop "no progress: this attempt began at step $start_step too. Mend what fails and submit again"
fi
if [ "$restarts" -ge "$max_restarts" ]; then stop "requeued $restarts times, and --max-restarts is $max_restarts"; fi
say "requeued: goes on from step $reached"
scontrol requeue "$job" || stop "it could not be requeued. Submit again to go on from step $reached"
