// One decoder step for rows of requests, as a chain of small kernels in one stream: see t5_trt/kernels/decode_step.py.
#include "attention.cuh"
#include "ends.cuh"
#include "layers.cuh"
