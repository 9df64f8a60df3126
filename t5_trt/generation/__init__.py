"""What `generate()` needs beside the engines: the cache and the encoder output that it passes around."""
