import sys; sys.argv=['x']
exec(open('/tmp/exp/table.py').read().split("if __name__")[0])
NAMES={"wording":"held-out wordings obeyed","rule":"rules never trained obeyed","reference":"no pressure: message held","conflict":"conflict: message held","five_turns":"five turns: message held in all","reference_answered":"answers right, no pressure","conflict_answered":"answers right, conflict"}
def cell(v): return f"{100*v.mean():.1f} [{100*v.mean(1).min():.1f}, {100*v.mean(1).max():.1f}]"
seeds=[s for s in range(42,47) if os.path.exists(f'/tmp/exp/f-1-none-0.5-{s}.json')]
a=[load(f'f-sft-{s}') for s in seeds]; b=[load(f'f-1-none-0.5-{s}') for s in seeds]
print("| | rows | SFT | with the loss | difference | p |"); print("|---|---:|---|---|---|---:|")
for k,n in NAMES.items():
    va,vb=[np.array([x['verdicts'][k] for x in y],float) for y in(a,b)]
    g=groups[k]; ids={x:i for i,x in enumerate(dict.fromkeys(g))}
    (e,)=estimate_means((vb-va).reshape(-1,1),np.array([ids[x] for x in g]*len(seeds)),np.zeros(1),[(-1.,1.)])
    print(f"| {n} | {va.shape[1]} | {cell(va)} | {cell(vb)} | {100*e.mean:+.1f} [{100*e.low:+.1f}, {100*e.high:+.1f}] | {e.p:.2f} |")
l=[np.array([x['validation_loss'] for x in y]) for y in(a,b)]
from itertools import product
d=l[1]-l[0]; p=np.mean([abs((d*np.array(s)).sum())>=abs(d.sum())-1e-12 for s in product((1,-1),repeat=len(d))])
print(f"| validation loss, nats per token | 40 | {l[0].mean():.3f} [{l[0].min():.3f}, {l[0].max():.3f}] | {l[1].mean():.3f} [{l[1].min():.3f}, {l[1].max():.3f}] | {d.mean():+.3f} [{d.min():+.3f}, {d.max():+.3f}] | |")
print([round(np.mean([x[k] for x in y])) for y in(a,b) for k in('tokens','rows','pairs','own_trained_tokens')], seeds, p, [[round(min(x['train_seconds'] for x in y)),round(max(x['train_seconds'] for x in y))] for y in (a,b)])
print()
print("| other message | starts | weight | wordings | never trained | no pressure | conflict | validation loss | rows |"); print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
def row(f,*head):
    x=load(f); v=x['verdicts']; print("| "+" | ".join([*head,*(f"{100*np.mean(v[k]):.1f}" for k in("wording","rule","reference","conflict")),f"{x['validation_loss']:.3f}",str(x['rows'])])+" |")
row('s-sft-42','SFT alone','','')
for n,nn in(("sibling","a sibling's"),("none","none")):
    for s,ss in(("0","at once"),("0.5","half-way")):
        for w in("0.3","1","3"): row(f's-{w}-{n}-{s}-42',nn,ss,w)
