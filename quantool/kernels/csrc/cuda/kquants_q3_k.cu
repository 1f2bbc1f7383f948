// Q3_K: see kquants.cuh; a file of its own, for it takes long to compile.
#include "kquants.cuh"

QUANTOOL_QUANTIZE(q3_k, Q3K)
