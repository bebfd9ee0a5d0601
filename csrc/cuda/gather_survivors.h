// What a launch of the CUDA gather of survivors' maps takes, and how its work is cut into pieces.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../types.h"

namespace eefast::cuda {

using Gather = GatherArguments;

// A thread block copies one part of some rows at a time.
struct GatherPieces {
  static constexpr int kThreads = 256, kUnroll = 4;

  int unit;       // bytes that are copied at once: 16, or what the addresses allow
  int64_t units;  // of a row
  int threads;    // that share a row, a power of two
  int parts;      // of a row, one block each
  int rows;       // of a block
  int64_t count;  // pieces, if all rows are live
};

inline GatherPieces pieces_of(const Gather& gather) {
  GatherPieces p{};
  const auto addresses = reinterpret_cast<uintptr_t>(gather.features) | reinterpret_cast<uintptr_t>(gather.out) |
                         (gather.samples > 1 ? gather.sample_stride : 0) | (gather.places > 1 ? gather.out_stride : 0) |
                         gather.row_bytes;
  for (p.unit = 16; addresses % p.unit != 0;) p.unit /= 2;
  p.units = gather.row_bytes / p.unit;
  for (p.threads = 1; p.threads < GatherPieces::kThreads && p.threads * GatherPieces::kUnroll < p.units;)
    p.threads *= 2;
  const int64_t part = p.threads * GatherPieces::kUnroll;
  p.parts = static_cast<int>((p.units + part - 1) / part);
  p.rows = GatherPieces::kThreads / p.threads;
  p.count = (gather.size + p.rows - 1) / p.rows * p.parts;
  return p;
}

// Queues the kernel on a stream of a device; null, or what went wrong.
const char* launch_gather_survivors(const Gather& gather, int device, void* stream);

}  // namespace eefast::cuda
