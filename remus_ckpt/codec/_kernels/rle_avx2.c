#include "kernels.h"

#if REMUS_X86
#include "isa_avx2.h"
#include "rle.h"

RLE_ENCODE(avx2)
RLE_APPLY(avx2)
#endif
