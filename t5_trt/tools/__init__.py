"""Comparing and measuring models: what `t5-trt verify` and `t5-trt bench` do, and the models and texts they try."""
