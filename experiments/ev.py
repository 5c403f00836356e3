import sys, json; sys.path.insert(0,'/work/wt-merge/recipes/smollm2-135m')
from pathlib import Path
import shutil, seeds
before, folder = map(Path, sys.argv[1:3])
for n in seeds.SHARED_SCORES:
    if (before/n).exists() and not (folder/n).exists(): shutil.copy(before/n, folder/n)
seeds.evaluate("rules","--data",seeds.HELD_OUT,"--before",before,"--after",folder,*seeds.LIMITS)
seeds.measure_pressure(folder)
seeds.evaluate("compare",before,folder)
R=[seeds.read_results(f) for f in (before,folder)]
print("FIGURES", folder, {k: tuple(round(100*seeds.value(r,*m),1) for r in R) for k,m in seeds.MEASURES.items()})
