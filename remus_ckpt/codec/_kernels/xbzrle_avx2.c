#include "kernels.h"

#if REMUS_X86
#include "isa_avx2.h"
#include "xbzrle.h"

XBZRLE_ENCODE(avx2)
XBZRLE_SEND(avx2)
XBZRLE_APPLY(avx2)
#endif
