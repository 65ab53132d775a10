#include "kernels.h"

#if REMUS_X86
#include "isa_avx512.h"
#include "xbzrle.h"

XBZRLE_ENCODE(avx512)
XBZRLE_SEND(avx512)
XBZRLE_APPLY(avx512)
#endif
