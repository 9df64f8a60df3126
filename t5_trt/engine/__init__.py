"""TensorRT engines: built once per checkpoint, shape bucket and GPU, kept on disk, loaded by the session."""
