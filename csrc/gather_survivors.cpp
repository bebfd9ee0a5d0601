// The CPU side of eefast::gather_survivors: checks the indices, copies the rows.
#include <cstdint>
#include <cstring>

#include "checks.h"
#include "gather_survivors_arguments.h"
#include "ops.h"
#include "tensors.h"

namespace eefast {

void gather_survivors(const Tensor& features, const Tensor& rows, const Tensor& live, const Tensor& out,
                      const std::optional<Tensor>& offset) {
  // Bytes from which on another thread copies some of them.
  constexpr int64_t kGrain = 1 << 20;
  const CheckedGather checked = check_gather_survivors(false, features, rows, live, out, offset);
  const GatherArguments& gather = checked.arguments;
  const int64_t count = *gather.live, first = gather.offset == nullptr ? 0 : *gather.offset;
  if (count < 0 || count > gather.size) {
    fail("live = ", count, "; expected 0 … ", gather.size, ", the length of rows");
  }
  if (first < 0 || first > gather.places - count) {
    fail("offset = ", first, "; expected 0 … ", gather.places - count, ", where ", count, " rows fit into out");
  }
  for (int64_t i = 0; i < count; ++i) {
    if (gather.rows[i] < 0 || gather.rows[i] >= gather.samples) {
      fail("rows[", i, "] = ", gather.rows[i], " is outside of features, which has ", gather.samples, " rows");
    }
  }
  const auto* const from = static_cast<const char*>(gather.features);
  auto* const to = static_cast<char*>(gather.out) + first * gather.out_stride;
  parallel_for(count, kGrain / gather.row_bytes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(to + i * gather.out_stride, from + gather.rows[i] * gather.sample_stride, gather.row_bytes);
    }
  });
}

}  // namespace eefast
