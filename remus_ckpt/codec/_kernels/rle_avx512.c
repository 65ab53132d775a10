#include "kernels.h"

#if REMUS_X86
#include "isa_avx512.h"
#include "rle.h"

RLE_ENCODE(avx512)
RLE_APPLY(avx512)
#endif
