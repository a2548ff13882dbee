"""The artifact: a directory with packed safetensors shards and a config.json that transformers reads."""
