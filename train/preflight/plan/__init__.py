"""Plan of a run on given GPUs: memory of each part under each way to distribute it, FLOPs and hours."""
