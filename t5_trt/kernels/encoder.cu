// The encoder between its matrix products, in half precision: see t5_trt/kernels/encoder.py.
//
// Compile-time constants: STORAGE and ACTIVATION (types.cuh); E, H, D, FF (d_model, heads, d_kv, inner size of the feed-forward layer); GATED.
#include "launch.cuh"
#include "encoder_attention.cuh"
#include "encoder_rows.cuh"

// Of attend_encoder and attend_encoder_wide: queries of a CTA, bytes of dynamic shared memory. Then rows of a CTA of add_and_norm.
extern "C" {
__device__ int geometry[] = {
    AttentionMemory<1>::QUERIES, AttentionMemory<1>::BYTES, AttentionMemory<MOST_TILES>::QUERIES, AttentionMemory<MOST_TILES>::BYTES, ROWS_OF_CTA,
};
}
