"""Running engines: one request's buffers, one session per backend, and the choice between backends."""
