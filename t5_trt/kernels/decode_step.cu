// One decoder step for rows of requests, as a chain of small kernels in one stream: see t5_trt/kernels/decode_step.py.
#include "attention.cuh"
#include "ends.cuh"
#include "layers.cuh"
#if STORAGE != FLOAT32 && (D == 64 || D == 128)
#include "shared_attention.cuh"
#else
constexpr int SHARERS = 1;  // there is no attend_shared
#endif

// Of project_qkv, add_attention, project_query, feed_forward_in, feed_forward_out and output_head: tiles of outputs of a CTA (gate and up
// count as one), its rows, bytes of dynamic shared memory. Last, the most rows of a CTA of attend_shared.
extern "C" {
__device__ int geometry[] = {
    QKV_TILES, QkvProduct::OWN_ROWS, QkvProduct::SHARED, ADD_TILES, AddProduct::OWN_ROWS, AddProduct::SHARED, QUERY_TILES, QueryProduct::OWN_ROWS, QueryProduct::SHARED,
    IN_TILES, InProduct::OWN_ROWS, InProduct::SHARED, ADD_TILES, OutProduct::OWN_ROWS, OutProduct::SHARED, HEAD_WIDE, HEAD_ROWS, HEAD_SHARED,
    SHARERS,
};
}
