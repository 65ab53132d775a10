/* Which kernels this build holds, and what each of them needs. */
#include "kernels.h"

const size_t remus_max_page[REMUS_CODECS] = {REMUS_DELTA_MAX, REMUS_RLE_MAX, REMUS_XBZRLE_MAX, REMUS_XBZRLE_MAX};

#define KERNEL(isa, features, test)                                                                              \
    static const remus_kernel isa##_kernel = {                                                                   \
        #isa,                                                                                                    \
        features,                                                                                                \
        test,                                                                                                    \
        {                                                                                                        \
            {remus_delta_encode_##isa, remus_delta_check_##isa, remus_delta_apply_##isa},                        \
            {remus_rle_encode_##isa, remus_rle_check, remus_rle_apply_##isa},                                    \
            {remus_xbzrle_encode_##isa, remus_xbzrle_check, remus_xbzrle_apply_##isa},                           \
            {remus_xbzrle_fold_encode_##isa, remus_xbzrle_check, remus_xbzrle_apply_##isa},                      \
        },                                                                                                       \
        remus_dirty_##isa,                                                                                       \
        remus_filled_##isa,                                                                                      \
        remus_compare_##isa,                                                                                     \
        remus_gather_##isa,                                                                                      \
        remus_scatter_##isa,                                                                                     \
        remus_xbzrle_send_##isa,                                                                                 \
    };

static int always(void)
{
    return 1;
}

KERNEL(scalar, "", always)

#if REMUS_X86
static int has_avx2(void)
{
    return REMUS_CPU_HAS(avx2) && REMUS_CPU_HAS(bmi) && REMUS_CPU_HAS(bmi2) && REMUS_CPU_HAS(popcnt);
}

static int has_avx512(void)
{
    return has_avx2() && REMUS_CPU_HAS(avx512f) && REMUS_CPU_HAS(avx512bw) && REMUS_CPU_HAS(avx512vl)
           && REMUS_CPU_HAS(avx512vbmi2);
}

KERNEL(avx2, "avx2 bmi bmi2 popcnt", has_avx2)
KERNEL(avx512, "avx2 bmi bmi2 popcnt avx512f avx512bw avx512vl avx512vbmi2", has_avx512)
#endif

const remus_kernel *const remus_kernels[] = {
    &scalar_kernel,
#if REMUS_X86
    &avx2_kernel,
    &avx512_kernel,
#endif
    NULL,
};
