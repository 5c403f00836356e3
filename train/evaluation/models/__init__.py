"""Models under evaluation: local ones with transformers or vLLM, and models behind OpenAI-compatible servers."""
