"""The parts of `generate()` outside of the engines: decode loops, processors, cache, encoder output; and `generate_many`."""
