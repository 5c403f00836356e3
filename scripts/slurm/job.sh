
# Below is scripts/slurm/job.sh, the same for all jobs.
set -u # no -e: failures are handled below

say() { echo "[$(date '+%F %T')] $*"; }

stop() { # end the job without a requeue
    say "stopped: $*"
    exit 1
}

newest_step() { # print the step of the newest complete checkpoint in output_dir; 0 if there is none
    local complete step newest=0
    for complete in "$output_dir"/checkpoint-*/COMPLETE.json; do
        step=${complete%/COMPLETE.json}
        step=${step##*/checkpoint-}
        if [ -f "$complete" ] && [ "$step" -gt "$newest" ]; then newest=$step; fi
    done
    echo "$newest"
}

in_outcome() { # print key $1 of outcome.json, which the trainer writes at its end; nothing if it was killed
    [ -f "$output_dir/outcome.json" ] &&
        python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]] or "")' \
            "$output_dir/outcome.json" "$1"
}

# The warning before the time limit (SIGUSR1) and SIGTERM (scancel, preemption) only create a file that the trainer
# polls: it saves and ends by itself. The launcher gets no signal, because it would kill its processes at once.
stop_file=$output_dir/stop-$SLURM_JOB_ID
rm -f "$stop_file" # left by an earlier attempt
trap 'say "SIGUSR1 before the time limit: the trainer saves and stops"; touch "$stop_file"' USR1
trap 'say "SIGTERM: the trainer saves if there is time"; touch "$stop_file"' TERM

# Job, nodes and time limit: printed once, here.
job=$SLURM_JOB_ID # for squeue and scontrol, the id of an array's last task is the id of the array
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
restarts=${SLURM_RESTART_COUNT:-0}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node get different ports
ends=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs "$job" --format %e)
if ends_at=$(date --date "${ends:-unknown}" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$ends_at; fi
export MASTER_ADDR MASTER_PORT
# Since Slurm 22.05 srun ignores --cpus-per-task, and would give one core to the processes of each node.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# Memory segments of PyTorch that can grow: packed batches differ in their largest tensors, and segments of a fixed size
# leave holes that none fits into. PyTorch reads PYTORCH_CUDA_ALLOC_CONF first, so any setting of the user's stays. The
# conflict is with registering PyTorch's buffers in NCCL (pytorch#165419), which nothing here does.
if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}${PYTORCH_HIP_ALLOC_CONF:-}" ]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi
start_step=$(newest_step)
say "job $job, restart $restarts of at most $max_restarts, on $SLURM_JOB_NODELIST until ${ends:-unknown}"
say "first node $MASTER_ADDR, port $MASTER_PORT; output_dir $output_dir, newest complete checkpoint: step $start_step"

# Slurm itself requeues after a node failure, so a crash loop ends here too: each attempt must start at a later step
# than the one before.
attempts=$output_dir/slurm-$SLURM_JOB_ID.attempts # the start step of each attempt
if [ "$restarts" -gt "$max_restarts" ]; then stop "requeued $restarts times, and --max-restarts is $max_restarts"; fi
if [ -s "$attempts" ] && [ "$start_step" -le "$(tail -n 1 "$attempts")" ]; then
    stop "no progress: the previous attempt started at step $start_step too. Fix the error and submit again"
fi

# Preflight: all nodes have the same code, share the same folders, have free GPUs and reach each other.
TORCH_CPP_LOG_LEVEL=ERROR srun --kill-on-bad-exit=1 \
    python "$checkout/scripts/slurm/node_check.py" --gpus "$gpus" "${recipe[@]}" ||
    stop "the preflight failed, see above"

echo "$start_step" >>"$attempts"
# Remove the outcome of an earlier attempt, but keep that of a finished run: the trainer has nothing to do if it is of
# this recipe.
if [ "$(in_outcome outcome)" != finished ]; then rm -f "$output_dir/outcome.json"; fi
# One launcher per node. Single quotes: $SLURM_NODEID is expanded on that node, here it is always 0 (accelerate#2816).
# The launcher ignores Slurm's SIGTERM, which also reaches the trainer: it would end at once and end the trainer.
export PET_SIGNALS_TO_HANDLE=SIGINT # the only signal that torchrun handles
srun --kill-on-bad-exit=1 bash -c 'trap "" TERM; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' node \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "${launch[@]}" \
    "$checkout/$command" "${recipe[@]}" "${training[@]}" &
launched=$!
while kill -0 $launched 2>/dev/null; do wait $launched; done # a signal ends `wait`, not the process
wait $launched
code=$? # bash keeps the exit code of an ended process

outcome=$(in_outcome outcome)
if [ "$outcome" = finished ] && [ "$code" -ne 0 ] && [ ! "$output_dir/outcome.json" -nt "$attempts" ]; then
    outcome=failed # outcome.json is of an earlier, finished run: this attempt ended before it wrote one
fi
reason=$(in_outcome reason)
reached=$(newest_step)
trap - USR1 TERM
rm -f "$stop_file"
say "training ${outcome:-was killed or crashed}${reason:+ ($reason)}; newest complete checkpoint: step $reached"
if [ "$outcome" = finished ]; then exit 0; fi
# After `crashed`, or without an outcome (a node failed), another attempt may succeed if this one made progress.
if [ "$outcome" = failed ] || [ "$outcome" = interrupted ]; then
    stop "fix the error and submit again: training continues from step $reached"
fi
if [ "$outcome" = preempted ] && [ "$reason" = "the file stop" ]; then
    say "not requeued, because of $output_dir/stop. Submit again to continue from step $reached"
    exit 0
fi
state=$(squeue --noheader --jobs "$job" --format %T)
if [ "$state" != RUNNING ]; then stop "Slurm ends this job (${state:-it is gone}); only Slurm may requeue it"; fi
if [ "$reached" -le "$start_step" ]; then
    stop "no progress: this attempt started at step $start_step too. Fix the error and submit again"
fi
if [ "$restarts" -ge "$max_restarts" ]; then stop "requeued $restarts times, and --max-restarts is $max_restarts"; fi
say "requeued: continues from step $reached"
scontrol requeue "$job" || stop "the requeue failed. Submit again to continue from step $reached"
