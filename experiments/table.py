import json,sys,os,numpy as np
sys.path.insert(0,'/work/main'); os.chdir('/work/main')
from pathlib import Path
from train.resampling import estimate_means
from train.pressure.rule_rows import read_rule_rows
from train.pressure.rules import RULES
from train.pressure.selection import select_rows
from train.pressure.evaluation_set import build_rows
held=[r for _,r in read_rule_rows(Path("recipes/smollm2-135m/data/held_out.jsonl"),RULES)]
groups={n:[r["messages"][-2]["content"] for r in held if r["held_out"]==n] for n in("wording","rule")}
pr=select_rows(build_rows(),["reference","conflict"],None,52)
for s in("reference","conflict"):
    q=[r.question.question if hasattr(r.question,'question') else str(r.question) for r in pr if r.pressure.setting==s]
    groups[s]=q; groups[s+"_answered"]=q
groups["five_turns"]=[str(i) for i in range(26)]
load=lambda f: json.load(open(f'/tmp/exp/{f}.json'))
def compare(name, seeds, prefix='f'):
    a=[load(f'{prefix}-sft-{s}') for s in seeds]; b=[load(f'{prefix}-{name}-{s}') for s in seeds]
    print(name, seeds, 'seconds', [round(np.mean([x['train_seconds'] for x in y])) for y in (a,b)], 'tokens',[round(np.mean([x['tokens'] for x in y])) for y in (a,b)],'rows',[round(np.mean([x['rows'] for x in y])) for y in (a,b)],'pairs',b[0]['pairs'])
    for k in a[0]['verdicts']:
        va,vb=np.array([x['verdicts'][k] for x in a],float),np.array([x['verdicts'][k] for x in b],float)
        g=groups[k]; ids={x:i for i,x in enumerate(dict.fromkeys(g))}
        d=(vb-va).reshape(-1,1); num=np.array([ids[x] for x in g]*len(seeds))
        (e,)=estimate_means(d,num,np.zeros(1),[(-1.,1.)])
        f=lambda v:f"{100*v.mean():.1f} [{100*v.mean(1).min():.1f}, {100*v.mean(1).max():.1f}]"
        print(f"  {k:20} n={va.shape[1]:3} SFT {f(va)}  with {f(vb)}  diff {100*e.mean:+.1f} [{100*(e.low or 0):+.1f}, {100*(e.high or 0):+.1f}] p={e.p:.4f} by seed {np.round(100*(vb-va).mean(1),1).tolist()}")
    l=[np.array([x['validation_loss'] for x in y]) for y in(a,b)]
    print('  validation loss', l[0].round(3), l[1].round(3), l[0].mean().round(3), l[1].mean().round(3))
if __name__=="__main__":
    import glob
    seeds=[s for s in range(42,47) if os.path.exists(f'/tmp/exp/f-sft-{s}.json')]
    names=sorted({os.path.basename(f)[2:-8] for f in glob.glob('/tmp/exp/f-*.json')}-{'sft'})
    for n in names: compare(n,[s for s in seeds if os.path.exists(f'/tmp/exp/f-{n}-{s}.json')])
    if '-s' in sys.argv:
        for n in sorted({os.path.basename(f)[2:-8] for f in glob.glob('/tmp/exp/s-*-42.json')}-{'sft'}): compare(n,[42],'s')
