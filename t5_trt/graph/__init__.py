"""T5's encoder and decoder as ONNX graphs: sizes, names of inputs and outputs, nodes, fp16 scaling, int8.

`t5_trt.graph.build_graph` writes them. Nothing is imported here: build processes read `signature` without loading torch.
"""
