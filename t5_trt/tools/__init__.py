"""Comparing and measuring models for `t5-trt verify` and `t5-trt bench`, with models and texts to try."""
