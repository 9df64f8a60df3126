"""What `generate()` needs beside the engines: decode loops, processors, cache, encoder output; and `generate_many`."""
