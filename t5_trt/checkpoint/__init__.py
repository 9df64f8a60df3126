"""Checkpoints: their names and files, configs, tokenizers, and loading them through Transformers."""
