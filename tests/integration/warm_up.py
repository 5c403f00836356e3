"""Preparation of the fork server: slow first calls are done, and what is imported is excluded from garbage collection.

Each rank then starts 5 s earlier: a run collects garbage before it trains, and draws a plot at its end.
"""

import gc
import io

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from train.reporting.plots import load_pyplot

figure, axes = load_pyplot().subplots(layout="constrained")
axes.plot([1, 2], [1, 2], label="loss")
figure.savefig(io.BytesIO())
load_pyplot().close(figure)
get_checkpoint_conversion_mapping("llama")
gc.collect()
gc.freeze()
