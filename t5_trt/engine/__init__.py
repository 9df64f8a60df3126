"""TensorRT engines: building them, and storing them on disk.

One engine serves an architecture at one shape bucket, precision, TensorRT version and kind of GPU. It holds no weights and so
serves every checkpoint of the architecture; engines of ``precision="int8"`` do hold weights and belong to one checkpoint.
"""
