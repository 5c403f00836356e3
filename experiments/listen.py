"""One run of the experiment: python listen.py OUT.json --seed S --steps N [--weight W --negatives sibling|none --from 0|0.5]"""
import argparse, json, math, random, time
from dataclasses import replace
from pathlib import Path
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from train.recipe import load_recipe
from train.data.tokens.workers import RowTokenizer
from train.data.packing import plan_packing
from train.system_gain.variants import read_labelled_conversations, select_rows, split_system_message, VariantRows, answer_ids
from train.loop.loss import score_labels
from train.samples.generation import generate_answers
from train.pressure.selection import select_rows as select_pressure
from train.pressure.evaluation_set import build_rows
from train.pressure.turns import build_turns_set
from train.pressure.rule_rows import read_rule_rows
from train.pressure.rules import RULES
from train.model.tokenizer import load_chat_tokenizer

p = argparse.ArgumentParser()
p.add_argument("out"); p.add_argument("--seed", type=int, default=42); p.add_argument("--steps", type=int, default=172)
p.add_argument("--weight", type=float, default=0); p.add_argument("--negatives", default="sibling")
p.add_argument("--start", type=float, default=0); p.add_argument("--temperature", type=float, default=1)
p.add_argument("--quick", action="store_true"); p.add_argument("--check", action="store_true")
o = p.parse_args()
began = time.time()
from train.loop.cpu_memory import keep_freed_memory; keep_freed_memory()
recipe = load_recipe("recipes/smollm2-135m/sft/quickstart.yaml")
tokenizer = load_chat_tokenizer(recipe.model, recipe.chat).tokenizer
rt = RowTokenizer(tokenizer, recipe.chat.train_on, recipe.chat.control_tokens_in_text)
rows = read_labelled_conversations(recipe.data.sources)
order = list(range(len(rows))); random.Random(0).shuffle(order)
validation, training = [rows[i] for i in order[:40]], [rows[i] for i in order[40:]]

def encode(conversations):
    out = rt.encode(conversations)
    assert all(not isinstance(x, Exception) and len(x) == 1 for x in out)
    return [x[0] for x in out]

def with_negatives(rows, seed):
    own = encode([r.conversation for r in rows])
    negative = [None] * len(rows)
    chosen = {id(s.row): s for s in select_rows(rows, VariantRows([]), others=1, seed=seed)}
    numbers, conversations = [], []
    for n, row in enumerate(rows):
        s = chosen.get(id(row))
        if s is None or (o.negatives == "sibling" and not s.siblings): continue
        _, rest = split_system_message(row.conversation.messages)
        head = [{"role": "system", "content": s.others[0]}] if o.negatives == "sibling" else []
        numbers.append(n); conversations.append(replace(row.conversation, messages=head + rest))
    for n, piece in zip(numbers, encode(conversations)):
        if len(piece.ids) + len(own[n].ids) <= 512 and (answer_ids(piece) == answer_ids(own[n])).all():
            negative[n] = piece
    return own, negative

def sequences(units, seed, epoch=0):
    plan = plan_packing([sum(len(x.ids) for x in u if x is not None) for u in units], 512, seed=seed, epoch=epoch)
    seqs = [[units[i] for i in plan.rows[a:b]] for a, b in zip(plan.ends[:-1], plan.ends[1:])]
    random.Random(seed * 1000 + epoch).shuffle(seqs)
    return seqs

def batch(seq):
    ids, labels, positions, owner = [], [], [], []
    pairs = []
    docs = 0
    def add(piece):
        nonlocal docs
        l = [-100] * len(piece.ids)
        for a, b in piece.trained.tolist(): l[a:b] = piece.ids[a:b].tolist()
        l[0] = -100
        ids.extend(piece.ids.tolist()); labels.extend(l); positions.extend(range(len(piece.ids))); owner.extend([docs] * len(piece.ids))
        docs += 1
        return docs - 1
    own_docs = []
    for own, neg in seq:
        a = add(own); own_docs.append(a)
        if neg is not None: pairs.append((a, add(neg)))
    t = lambda x: torch.tensor([x])
    return dict(input_ids=t(ids), labels=t(labels), position_ids=t(positions)), torch.tensor(owner[1:]), own_docs, pairs, docs

own, negative = with_negatives(training, o.seed)
use = o.weight > 0
tokens = sum(len(x.ids) for x in own)
plan = []
if not use:
    epoch = 0
    while len(plan) < o.steps: plan += sequences([(x, None) for x in own], o.seed, epoch); epoch += 1
    plan = plan[:o.steps]
elif o.start == 0:
    plan = sequences(list(zip(own, negative)), o.seed)[:o.steps]
else:
    first = int(o.steps * o.start)
    singles = sequences([(x, None) for x in own], o.seed)
    plan = singles[:first]
    used = {id(u[0]) for s in plan for u in s}
    rest = [(x, n) for x, n in zip(own, negative) if id(x) not in used]
    if not rest: rest = list(zip(own, negative))
    second = sequences(rest, o.seed, 1)
    if len(second) < o.steps - first: second += sequences(list(zip(own, negative)), o.seed, 2)
    plan += second[: o.steps - first]
assert len(plan) == o.steps, (len(plan), o.steps)
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
torch.manual_seed(o.seed)
model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32, attn_implementation="sdpa")
model.config.use_cache = False
opt = torch.optim.AdamW(model.parameters(), lr=1.5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
sched = get_cosine_schedule_with_warmup(opt, math.ceil(0.05 * o.steps), o.steps)

def document_sums(inputs, owner, docs):
    with torch.autocast("cpu", torch.bfloat16):
        out = score_labels(model, model, inputs)
    lp, mask = out.log_probs[0], out.label_mask[0].float()
    z = torch.zeros(docs)
    return z.index_add(0, owner, lp), z.index_add(0, owner, mask)

if o.check:  # documents are apart: the sums of a sequence equal those of its documents alone
    model.eval()
    seq = plan[-1]; i, ow, od, pr, d = batch(seq)
    with torch.no_grad():
        s, c = document_sums(i, ow, d)
        alone = [document_sums(*(lambda b: (b[0], b[1], b[4]))(batch([(piece, None)])))[0] for u in seq for piece in u if piece is not None]
    print("check", (s - torch.cat(alone)).abs().max(), s[:4], [float(x) for x in alone[:4]])
model.train()
own_tokens = all_tokens = 0; paired = 0; step_rows = 0
log = []
train_began = time.time()
for step, seq in enumerate(plan):
    inputs, owner, own_docs, pairs, docs = batch(seq)
    sums, counts = document_sums(inputs, owner, docs)
    d = torch.tensor(own_docs)
    loss = -sums[d].sum() / counts[d].sum()
    listen = torch.zeros(())
    if pairs and use:
        a, b = torch.tensor(pairs).T
        listen = torch.nn.functional.softplus(-((sums[a] - sums[b]) / counts[a]) / o.temperature).mean()
    (loss + o.weight * listen).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step(); sched.step(); opt.zero_grad(set_to_none=True)
    all_tokens += inputs["input_ids"].numel(); own_tokens += int(counts[d].sum()); paired += len(pairs); step_rows += len(seq)
    log.append((float(loss), float(listen)))
    if step % 20 == 0: print(step, *map(lambda x: round(x, 4), log[-1]), f"{time.time()-train_began:.0f}s", flush=True)
train_seconds = time.time() - train_began
model.eval()
vown = encode([r.conversation for r in validation])
with torch.no_grad():
    total = n = 0
    for s in sequences([(x, None) for x in vown], 0):
        i, ow, od, pr, dd = batch(s); a, b = document_sums(i, ow, dd); total -= float(a.sum()); n += float(b.sum())
result = {"options": vars(o), "train_seconds": train_seconds, "tokens": all_tokens, "own_trained_tokens": own_tokens, "rows": step_rows, "pairs": paired,
          "validation_loss": total / n, "verdicts": {}}
del opt
def answers(conversations):
    return [a.text for a in generate_answers(model, tokenizer, accelerator, conversations, max_new_tokens=48, batch_size=52, on_progress=lambda n: None)]
v = result["verdicts"]
held = [row for _, row in read_rule_rows(Path("recipes/smollm2-135m/data/held_out.jsonl"), RULES)]
texts = answers([row["messages"][:-1] for row in held])
for name in ("wording", "rule"):
    v[name] = [RULES[r["rule"]].check(r["messages"][-2]["content"], t) for r, t in zip(held, texts) if r["held_out"] == name]
settings = ["reference", "conflict"] if not o.quick else ["conflict"]
settings = ["reference", "conflict"]
pr = select_pressure(build_rows(), settings, None, 52)
texts = answers([r.messages for r in pr])
for s in settings:
    vs = [r.judge(t) for r, t in zip(pr, texts) if r.pressure.setting == s]
    v[s] = [x.held for x in vs]; v[s + "_answered"] = [x.answered for x in vs]
if not o.quick:
    conv = [r.plain for r in build_turns_set(26, 5, 3)]
    said = [[] for _ in conv]
    for turn in range(5):
        for s, t in zip(said, answers([c.messages(s) for c, s in zip(conv, said)])): s.append(t)
    v["five_turns"] = [all(c.judge(t, s[t]).held for t in range(5)) for c, s in zip(conv, said)]
result["seconds"] = time.time() - began
result["log"] = log
Path(o.out).write_text(json.dumps(result))
print({k: f"{sum(x)/len(x):.1%}" for k, x in v.items()}, round(result["validation_loss"], 4), f"{train_seconds:.0f}s of {result['seconds']:.0f}s, rows {step_rows}, pairs {paired}")
