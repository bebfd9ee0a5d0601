// The CPU side of eefast::exit_head: checks the indices, splits the live list among threads, lists the survivors.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/exit_head.h"
#include "cpu/room.h"
#include "exit_head_arguments.h"
#include "ops.h"
#include "tensors.h"

namespace eefast {
namespace {

void check_indices(const char* name, const int32_t* values, int64_t live, int64_t size, const char* owner) {
  for (int64_t i = 0; i < live; ++i) {
    if (values[i] < 0 || values[i] >= size) {
      fail(name, "[", i, "] = ", values[i], " is outside of ", owner, ", which has ", size, " rows");
    }
  }
}

// Each sample with a rule reads and writes a place of its own.
void check_distinct(const int32_t* positions, int64_t live, int64_t results) {
  auto taken = cpu::room<uint8_t>("the places that are taken", results);
  for (int64_t i = 0; i < live; ++i) {
    if (std::exchange(taken.data()[positions[i]], uint8_t{1})) {
      fail("positions has a place twice; with a rule every sample needs another one");
    }
  }
}

// The same pixels in as few lines as their strides allow.
void merge_lines(ExitHeadArguments& head) {
  // The stride of a dimension of size 1 may be any number.
  if (head.samples <= 1) head.sample_stride = 1;
  if (head.channels == 1) head.channel_stride = 1;
  if (head.height == 1) head.row_stride = 1;
  if (head.width == 1) head.pixel_stride = head.row_stride;
  // Lines at even distances are one long line.
  const bool even = head.row_stride % head.width == 0 && head.row_stride / head.width == head.pixel_stride;
  if (head.width == 1 || head.height == 1 || even) {
    head.width *= std::exchange(head.height, 1);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> exit_head(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                             const std::optional<Tensor>& threshold, const Tensor& rows,
                                             const Tensor& positions, const Tensor& live, const std::string& criterion,
                                             int64_t exit_index, const Tensor& logits, const Tensor& confidence,
                                             const Tensor& exits, const std::optional<Tensor>& rule) {
  const CheckedExitHead checked = check_exit_head(false, features, weight, bias, threshold, rows, positions, live,
                                                  criterion, exit_index, logits, confidence, exits, rule);
  cpu::ExitHead head{checked.arguments, nullptr};
  const int64_t size = head.size, live_count = *head.live;
  if (live_count < 0 || live_count > size) fail("live = ", live_count, "; expected 0 … ", size, ", the length of rows");

  const int32_t *const all_rows = head.rows, *const all_positions = head.positions;
  // Copies: what has been checked must not change while it is used, whatever other threads write.
  auto list = cpu::room<int32_t>("the live list", 2 * live_count);
  std::copy_n(all_positions, live_count, std::copy_n(all_rows, live_count, list.begin()));
  head.rows = list.data();
  head.positions = list.data() + live_count;
  check_indices("rows", head.rows, live_count, head.samples, "features");
  check_indices("positions", head.positions, live_count, head.results, "logits");
  if (head.rule != nullptr) check_distinct(head.positions, live_count, head.results);
  auto survives = cpu::room<uint8_t>("the live list", live_count);
  head.survives = survives.data();
  merge_lines(head);

  const int32_t dtype = aoti_torch_dtype_int32(), cpu = aoti_torch_device_type_cpu();
  Tensor next_rows = empty("the next rows", {size}, dtype, cpu, 0);
  Tensor next_positions = empty("the next positions", {size}, dtype, cpu, 0);
  Tensor next_live = empty("the next live", {1}, dtype, cpu, 0);

  // Below this many elements a second thread costs more than it brings.
  constexpr int64_t kThreadWork = 65536;
  const int64_t work = sample_elements(features) + weight.numel();
  if (live_count > 0) {
    parallel_for(live_count, std::max<int64_t>(1, kThreadWork / work),
                 [&](int64_t begin, int64_t end) { cpu::exit_head(head, begin, end); });
  }
  *next_live.mutable_data_ptr<int32_t>() =
      cpu::partition(all_rows, all_positions, head.survives, live_count, size, next_rows.mutable_data_ptr<int32_t>(),
                     next_positions.mutable_data_ptr<int32_t>());
  return {next_rows, next_positions, next_live};
}

}  // namespace eefast
