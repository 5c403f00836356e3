"""Exclude all that is imported from garbage collection: each rank collects before it trains, 2 s with torch and TRL."""

import gc

gc.collect()
gc.freeze()
