cd /tmp/exp
while pgrep -f listen.py >/dev/null; do sleep 2; done
r() { ./one.sh s-$2-$3-$4-$1 --steps 86 --seed $1 --quick --weight $2 --negatives $3 --start $4; }
./one.sh s-sft-42 --steps 86 --seed 42 --quick
r 42 1 sibling 0; r 42 1 none 0; r 42 1 sibling 0.5; r 42 0.3 sibling 0; r 42 3 sibling 0; r 42 1 none 0.5
r 42 3 sibling 0.5; r 42 0.3 none 0; r 42 3 none 0; r 42 0.3 sibling 0.5; r 42 0.3 none 0.5; r 42 3 none 0.5
./one.sh s-sft-43 --steps 86 --seed 43 --quick
