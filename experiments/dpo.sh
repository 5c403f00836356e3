#!/bin/bash
# dpo.sh NAME SEED OVERRIDES: train from the quickstart of SEED and measure
cd /work/wt-merge; export PYTHONPATH=/work/wt-merge HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
O=outputs/dpo-$1-$2; B=outputs/smollm2-135m-quickstart; [ $2 = 42 ] || B=$B-seed-$2
[ -f $O/figures.txt ] && exit 0
.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml train/preference.py --recipe /tmp/exp/quickstart_dpo.yaml model.name_or_path=$B output_dir=$O seed=$2 "${@:3}" > /tmp/exp/dpo-$1-$2.log 2>&1 || { echo FAILED $1 $2; exit; }
.venv/bin/python /tmp/exp/ev.py $B $O >> /tmp/exp/dpo-$1-$2.log 2>&1
grep FIGURES /tmp/exp/dpo-$1-$2.log | tee $O/figures.txt
