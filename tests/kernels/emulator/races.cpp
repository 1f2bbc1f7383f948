// Data races of a kernel, found from one run of it.
//
// g++ -fsanitize=thread puts a call before every access of a kernel; this file is what is called, in the place of
// ThreadSanitizer, which knows nothing of warps and barriers. Of every byte it keeps the last write: who, where, and how
// often its block had passed __syncthreads and its warp __syncwarp by then. An access is ordered after that write if it
// is of the same thread, of the same block past a later __syncthreads, or of the same warp past a later __syncwarp.
// Blocks are ordered only by the end of the launch. Reads are not kept: a read before a racing write is found in a run
// in which the write comes first, and the order of threads is random.
#include "races.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator::races {
namespace {

constexpr uintptr_t PAGE = 4096;

struct Write {
  const void* pc;
  uint32_t block, barriers, warp_barriers;
  int thread;
  bool under_way;  // a copy_async that nobody has waited for
};
using Cells = uint32_t[PAGE];  // of each byte: which write, 0 for none in this launch

std::vector<Write> writes;
std::unordered_map<uintptr_t, std::unique_ptr<Cells>> pages;
uintptr_t last_page = 0;
uint32_t* last_cells = nullptr;
uintptr_t ignored = 0, shared = 0;
size_t ignored_bytes = 0, shared_bytes = 0;
uint32_t block, barriers, warp_barriers[1024 / WARP];

// The cell of a byte; those of its page follow. Null where nothing of the page was written, unless it is now.
uint32_t* cell(uintptr_t address, bool writing) {
  const uintptr_t page = address / PAGE;
  if (page != last_page || (!last_cells && writing)) {
    const auto found = pages.find(page);
    last_page = page, last_cells = found == pages.end() ? nullptr : *found->second;
    if (!last_cells && writing) {
      auto& made = pages[page];
      made.reset(new Cells[1]());
      last_cells = *made;
    }
  }
  return last_cells ? last_cells + address % PAGE : nullptr;
}

std::string line(const void* pc) {
  Dl_info module;
  char command[1024], file[512] = "", found[512] = "";
  if (!dladdr(pc, &module)) return "?";
  const size_t offset = (const char*)pc - 1 - (const char*)module.dli_fbase;  // the call before the return address
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, offset);
  if (FILE* lines = popen(command, "r")) {  // from the innermost inlined function outwards
    while (fgets(file, sizeof file, lines))
      if (!found[0] && !strstr(file, "/emulator.h:")) snprintf(found, sizeof found, "%s", file);
    pclose(lines);
  }
  const char* slash = strrchr(found, '/');
  const std::string name = slash ? slash + 1 : "?";
  return name.substr(0, name.find_first_of(" \n"));
}

[[noreturn]] void fail_at(uintptr_t address, int size, bool writing, const void* pc, const Write& earlier) {
  char where[64];
  if (address - shared < shared_bytes)
    snprintf(where, sizeof where, "byte %zu of shared memory", (size_t)(address - shared));
  else
    snprintf(where, sizeof where, "global memory at %p", (const void*)address);
  const std::string here = line(pc), there = line(earlier.pc);
  const char* does = writing ? "writes" : "reads";
  if (earlier.under_way)
    fail("%s %d bytes at %s (%s) while a copy_async of thread %d (%s) is under way", does, size, where, here.c_str(),
         earlier.thread, there.c_str());
  if (earlier.block != block)
    fail("%s %d bytes at %s (%s) that block %u wrote in the same launch (%s)", does, size, where, here.c_str(),
         earlier.block, there.c_str());
  fail("%s %d bytes at %s (%s) that thread %d wrote (%s) with no barrier between them", does, size, where,
       here.c_str(), earlier.thread, there.c_str());
}

bool ordered(const Write& write) {
  if (write.under_way || write.block != block) return false;
  if (write.thread == current || write.barriers < barriers) return true;
  const int warp = current / WARP;
  return write.thread / WARP == warp && write.warp_barriers < warp_barriers[warp];
}

// `bytes` of one page
void access(uintptr_t address, int bytes, bool writing, const void* pc, bool under_way = false) {
  uint32_t* cells = cell(address, writing);
  if (!cells) return;
  uint32_t seen = 0;
  for (int i = 0; i < bytes; i++) {
    if (cells[i] == seen) continue;
    seen = cells[i];
    if (!ordered(writes[seen])) fail_at(address + i, bytes, writing, pc, writes[seen]);
  }
  if (!writing) return;
  const uint32_t mine = (uint32_t)writes.size();
  writes.push_back({pc, block, barriers, warp_barriers[current / WARP], current, under_way});
  for (int i = 0; i < bytes; i++) cells[i] = mine;
}

}  // namespace

void ignore(const void* memory, size_t bytes) { ignored = (uintptr_t)memory, ignored_bytes = bytes; }

void begin_launch() {
  pages.clear();
  last_page = 0, last_cells = nullptr;
  writes.assign(1, {});
}

void begin_block(uint32_t block_, const void* shared_, size_t bytes) {
  block = block_, barriers = 0, shared = (uintptr_t)shared_, shared_bytes = bytes;
  memset(warp_barriers, 0, sizeof warp_barriers);
  for (uintptr_t address = shared; address < shared + bytes; address += PAGE - address % PAGE)
    if (uint32_t* cells = cell(address, false))
      for (uintptr_t i = address % PAGE; i < PAGE && address + i - address % PAGE < shared + bytes; i++)
        cells[i - address % PAGE] = 0;
}

void block_barrier() { barriers++; }
void warp_barrier(int warp) { warp_barriers[warp]++; }

uint32_t begin_copy(const void* to, const void* pc) {
  access((uintptr_t)to, 16, true, pc, true);
  return (uint32_t)writes.size() - 1;
}

void end_copy(uint32_t write) {
  Write& copy = writes[write];
  copy.under_way = false, copy.barriers = barriers, copy.warp_barriers = warp_barriers[current / WARP];
}

void touch(const void* pointer, int bytes, bool writing, const void* pc) {
  const auto address = (uintptr_t)pointer;
  if (current < 0 || address - ignored < ignored_bytes) return;
  if (address % bytes)
    fail("%s %d bytes at an address that is no multiple of it (%s)", writing ? "writes" : "reads", bytes,
         line(pc).c_str());
  access(address, bytes, writing, pc);
}

void touch_range(const void* pointer, size_t bytes, bool writing, const void* pc) {
  for (size_t i = 0; i < bytes; i++) touch((const char*)pointer + i, 1, writing, pc);
}

}  // namespace emulator::races

extern "C" {
void __tsan_init() {}
#define TOUCH(bytes)                                                                                           \
  void __tsan_read##bytes(void* p) { emulator::races::touch(p, bytes, false, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* p) { emulator::races::touch(p, bytes, true, __builtin_return_address(0)); }   \
  void __tsan_unaligned_read##bytes(void* p) {                                                                 \
    emulator::races::touch_range(p, bytes, false, __builtin_return_address(0));                                \
  }                                                                                                            \
  void __tsan_unaligned_write##bytes(void* p) {                                                                \
    emulator::races::touch_range(p, bytes, true, __builtin_return_address(0));                                 \
  }
TOUCH(1)
TOUCH(2)
TOUCH(4)
TOUCH(8)
TOUCH(16)
void __tsan_read_range(void* p, size_t bytes) {
  emulator::races::touch_range(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  emulator::races::touch_range(p, bytes, true, __builtin_return_address(0));
}
}
