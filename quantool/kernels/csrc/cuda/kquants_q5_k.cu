// Q5_K: see kquants.cuh; a file of its own, for it takes long to compile.
#include "kquants.cuh"

QUANTOOL_QUANTIZE(q5_k, Q5K)
