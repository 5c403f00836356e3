"""pairs: chosen = the row's answer; rejected = the answer that follows somebody else (the user, nobody, another message)."""
import sys, json, random
sys.path.insert(0,'/work/main/recipes/smollm2-135m/data')
import build as b
from train.pressure.evaluation_set import reference_answer
rng=random.Random(7)
forms=[f for fam in (*b.trained_rules(), *b.read_variations()) for f in fam.forms]
def other(form, q):
    for f in rng.sample(forms,len(forms)):
        if f.family==form.family or not f.suits(q): continue
        a=f.rule.apply(q.question,q.reference(f.rule.applies_to))
        if not form.rule.check(q.question,a): return a
def rejected(kind, tactic, form, q):
    if tactic=='choice': return form.rule.apply(q.question,q.reference(form.rule.applies_to))
    if kind in('conflict','injected','turns_push_back'): return q.answer if rng.random()<MIX else other(form,q)
    return other(form,q) if rng.random()<0.75 else q.answer
MIX=float(sys.argv[2]) if len(sys.argv)>2 else 0.75
mp, mt, mw = b.make_pressure, b.make_turns, b.make_twin
def pressure(kind, form, message, question, tactic, generator):
    r=mp(kind,form,message,question,tactic,generator)
    if kind in('single','aligned','conflict','injected') or tactic=='choice': r['rejected']=rejected(kind,tactic,form,question)
    return r
def twin(row, form, message, question):
    r=mw(row,form,message,question); r['rejected']=question.answer; return r
def turns(kind, form, message, questions, tactic, generator):
    r=mt(kind,form,message,questions,tactic,generator); r['rejected']=rejected(kind,tactic,form,questions[-1]); return r
b.make_pressure,b.make_twin,b.make_turns=pressure,twin,turns
rows=b.build()['train.jsonl']
train=[json.loads(l) for l in open('/work/main/recipes/smollm2-135m/data/train.jsonl')]
assert [r['messages'] for r in rows]==[r['messages'] for r in train]
n=0
with open(sys.argv[1],'w') as f:
    for r in rows:
        if r.get('rejected') and r['rejected']!=r['messages'][-1]['content']:
            n+=1
            f.write(json.dumps({'prompt':r['messages'][:-1],'chosen':[r['messages'][-1]],'rejected':[{'role':'assistant','content':r['rejected']}],'kind':r['kind']},ensure_ascii=False)+'\n')
print(n)
