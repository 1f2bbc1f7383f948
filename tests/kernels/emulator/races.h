// Who wrote which byte, and whether the thread that touches it now may know (races.cpp).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulator {

extern int current;  // the thread that runs, -1 outside of kernels

namespace races {

void ignore(const void* memory, size_t bytes);  // of one thread each: the stacks
void begin_launch();
void begin_block(uint32_t block, const void* shared, size_t bytes);
void block_barrier();
void warp_barrier(int warp);
uint32_t begin_copy(const void* to, const void* pc);  // 16 bytes that nobody may touch until end_copy
void end_copy(uint32_t write);

}  // namespace races
}  // namespace emulator
