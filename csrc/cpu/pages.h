// Huge page advice for large results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dph {

// Requests huge pages for a large result that is about to be written completely. Most of its pages are not mapped yet,
// and mapping huge pages is eight times as fast (3.3 instead of 27 ms for 48 MB).
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t least = int64_t{4} << 20, page = 4096;
  const intptr_t first = (reinterpret_cast<intptr_t>(data) + page - 1) / page * page;
  const intptr_t last = (reinterpret_cast<intptr_t>(data) + bytes) / page * page;
  if (bytes >= least) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // may be refused
#endif
}

}  // namespace dph
