"""janus-sft: a supervised fine-tuning trainer for models that follow system messages."""
