// One decoder step for rows of requests, as a chain of small kernels in one stream: see t5_trt/kernels/decode_step.py.
#include "ends.cuh"
#include "layers.cuh"
#if TILE_ATTENTION
#include "tile_attention.cuh"
#else
#include "attention.cuh"
constexpr int SHARERS = 1;  // there is no attend_shared
#endif

// Of project_qkv, add_attention, project_query, feed_forward_in, feed_forward_out and output_head: tiles of outputs of a CTA (gate and up
// count as one), its rows, bytes of dynamic shared memory, CTAs of a cluster that share k. Last, the most rows of a CTA of attend_shared.
#define OF(P, tiles) tiles, P::OWN_ROWS, P::SHARED, P::CLUSTER_CTAS
extern "C" {
__device__ int geometry[] = {
    OF(QkvProduct, QKV_TILES), OF(AddProduct, AddProduct::TILES), OF(QueryProduct, QUERY_TILES), OF(InProduct, IN_TILES), OF(OutProduct, OutProduct::TILES),
    HEAD_WIDE, HEAD_ROWS, HEAD_SHARED, 1, SHARERS,
};
}
