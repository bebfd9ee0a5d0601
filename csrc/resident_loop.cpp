// The resident loop for Python: checked tensors → images of the loop; its answers → tensors.
#include "cpu/resident_loop.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "ops.h"
#include "resident_run.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMaxWorkers = 1 << 10;

// A loop, and what it needs as long as it runs.
struct Open {
  std::shared_ptr<const std::pair<ResidentSource, Network>> known;
  Tensor counts;
  bool int8;
  cpu::ResidentLoop loop;
};

struct Loops {
  std::mutex lock;
  std::map<int64_t, std::shared_ptr<Open>> open;
  int64_t last = 0;
};

// Never destroyed, since threads may run when the process ends.
Loops& loops() {
  static auto& all = *new Loops;
  return all;
}

std::shared_ptr<Open> known(int64_t loop) {
  const std::lock_guard<std::mutex> lock(loops().lock);
  const auto found = loops().open.find(loop);
  return found == loops().open.end() ? nullptr : found->second;
}

std::shared_ptr<Open> find(int64_t loop) {
  std::shared_ptr<Open> open = known(loop);
  if (!open) fail("there is no loop ", loop);
  return open;
}

// [n] or [n, 1], of all images, or [n, N] → those of every image.
std::vector<std::shared_ptr<const float[]>> rows_of(const Tensor& limits, int64_t num_exits, int64_t images) {
  check_dtype("limits", limits, ScalarType::Float, "float32");
  check_stored("limits", limits);
  const bool each = limits.dim() == 2 && limits.size(1) != 1;
  if (limits.dim() < 1 || limits.dim() > 2 || limits.size(0) != num_exits || (each && limits.size(1) != images))
    fail("limits has shape ", shape(limits), "; expected [", num_exits, "] or [", num_exits, ", ", images, "]");
  std::vector<std::shared_ptr<const float[]>> found;
  for (int64_t i = 0; i < images; ++i) {
    if (i > 0 && !each) {
      found.push_back(found.front());
      continue;
    }
    std::shared_ptr<float[]> row(new float[num_exits + 1]);
    for (int64_t e = 0; e < num_exits; ++e) {
      row[e] = limits.const_data_ptr<float>()[e * limits.stride(0) + (each ? i * limits.stride(1) : 0)];
    }
    found.push_back(std::move(row));
  }
  return found;
}

}  // namespace

int64_t resident_loop_open(const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups,
                           const Tensor& packed, const Tensor& thresholds, const std::string& criterion,
                           int64_t num_classes, bool bfloat16, const std::optional<Tensor>& image,
                           const std::optional<Tensor>& rule, int64_t workers, const Tensor& counts) {
  if (workers < 1 || workers > kMaxWorkers) fail("workers = ", workers, "; expected 1 … ", kMaxWorkers);
  if (bfloat16 && cpu::instruction_set() != cpu::InstructionSet::avx512_bf16) {
    fail("bfloat16 needs AVX512-BF16, which this processor lacks or EEFAST_ISA excludes; use float32");
  }
  const Precision precision = image ? Precision::int8 : float_precision(bfloat16);
  ResidentSource source =
      read_tables(images, steps, maps, groups, packed, thresholds, criterion, num_classes, precision);
  check_dtype("counts", counts, ScalarType::Long, "int64");
  check_stored("counts", counts);
  check_shape("counts", counts, {source.num_exits + 2}, "[n + 2]");
  if (!counts.is_contiguous()) fail("counts is not contiguous");
  std::vector<float> scaling = image ? image_scaling(source, *image) : std::vector<float>();
  std::vector<float> numbers = rule_numbers(source, rule);
  auto known = pointed_network(std::move(source));
  const Network& network = known->second;
  if (network.loads || network.stored >= 0) fail("steps load or store features; expected a whole network");
  auto* const places = static_cast<int64_t*>(counts.mutable_data_ptr<int64_t>());
  std::shared_ptr<Open> made(new Open{
      std::move(known), counts, image.has_value(), {network, std::move(scaling), std::move(numbers), workers, places}});
  const std::lock_guard<std::mutex> lock(loops().lock);
  loops().open.emplace(++loops().last, std::move(made));
  return loops().last;
}

void resident_loop_put(int64_t loop, const Tensor& images, const Tensor& limits, int64_t ticket, double arrived,
                       double deadline) {
  const auto open = find(loop);
  const ResidentSource& source = open->known->first;
  check_there("images", images);
  check_stored("images", images);
  const bool bytes = open->int8 && images.scalar_type() == ScalarType::Byte;
  if (!bytes) check_dtype("images", images, ScalarType::Float, "float32");
  check_shape("images", images, {images.dim() == 4 ? images.size(0) : 0, source.channels, source.height, source.width},
              "[N, C, H, W]");
  const auto rows = rows_of(limits, source.num_exits, images.size(0));
  const Tensor dense = as_contiguous("images", images);
  const auto* const first = static_cast<const char*>(bytes ? static_cast<const void*>(dense.const_data_ptr<uint8_t>())
                                                           : dense.const_data_ptr<float>());
  const int64_t size =
      source.channels * source.height * source.width * (bytes ? 1 : static_cast<int64_t>(sizeof(float)));
  std::vector<cpu::Arrival> arrivals;
  for (int64_t i = 0; i < images.size(0); ++i) {
    std::shared_ptr<char[]> memory(new char[size]);
    std::memcpy(memory.get(), first + i * size, size);
    const void* const pixels = memory.get();
    arrivals.push_back({ticket + i, std::move(memory), pixels, bytes, rows[i], arrived, deadline});
  }
  if (!open->loop.put(std::move(arrivals))) fail("the loop ", loop, " is closed");
}

std::tuple<Tensor, Tensor> resident_loop_take(int64_t loop, double delay) {
  const auto open = find(loop);
  const std::vector<cpu::Answered> answers = open->loop.take(delay);
  const auto n = static_cast<int64_t>(answers.size());
  const int64_t classes = open->known->first.num_classes;
  const int32_t cpu = aoti_torch_device_type_cpu();
  Tensor figures = empty("figures", {n, 6}, aoti_torch_dtype_float64(), cpu, 0);
  Tensor logits = empty("logits", {n, classes}, aoti_torch_dtype_float32(), cpu, 0);
  double* to = figures.mutable_data_ptr<double>();
  float* numbers = logits.mutable_data_ptr<float>();
  for (const cpu::Answered& found : answers) {
    *to++ = static_cast<double>(found.ticket);
    *to++ = static_cast<double>(found.label);
    *to++ = static_cast<double>(found.exit);
    *to++ = found.confidence;
    *to++ = found.began;
    *to++ = found.ended;
    std::fill_n(std::copy(found.logits.begin(), found.logits.end(), numbers), classes - found.logits.size(), 0.0f);
    numbers += classes;
  }
  return {figures, logits};
}

void resident_loop_cancel(int64_t loop, int64_t ticket) {
  if (const auto open = known(loop)) open->loop.cancel(ticket);
}

void resident_loop_close(int64_t loop, bool drop) {
  if (const auto open = known(loop)) open->loop.close(drop);
}

void resident_loop_free(int64_t loop) {
  std::shared_ptr<Open> freed = find(loop);  // ends after the lock, since it waits for its threads
  freed->loop.close(true);                   // whoever waits in `take` holds it, too
  const std::lock_guard<std::mutex> lock(loops().lock);
  loops().open.erase(loop);
}

}  // namespace eefast
