// Checks the arguments of eefast::resident_forward, reads the network from them, hands both to the CPU engine.
#include "resident_forward.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "checks.h"
#include "cpu/resident.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

// The columns of `steps`, in the order of eefast/ops/resident_forward.py.
enum Column { kind, source, target, residual, relu, kernel, stride, padding, winograd, weight, packed_place, section };
constexpr int64_t kColumns = section + 1;

std::vector<int64_t> integers(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor, ScalarType::Long, "int64");
  if (!tensor.is_contiguous()) fail(name, " is not contiguous; call .contiguous()");
  const auto* const values = tensor.const_data_ptr<int64_t>();
  return {values, values + tensor.numel()};
}

struct Program {
  const std::vector<int64_t>& steps;
  const Tensor& packed;
  cpu::Network& network;

  [[noreturn]] void refuse(int64_t row, const char* what) const {
    fail("steps[", row, "] = ", brackets(std::vector<int64_t>(at(row), at(row) + kColumns)), ": ", what);
  }
  const int64_t* at(int64_t row) const { return steps.data() + row * kColumns; }
  int64_t rows() const { return static_cast<int64_t>(steps.size()) / kColumns; }

  void read(int64_t row, int64_t num_exits) {
    const int64_t* const s = at(row);
    const auto maps = static_cast<int64_t>(network.maps.size());
    const auto inside = [&](int64_t map, int64_t first) { return map >= first && map < maps; };
    const bool exit = s[kind] == static_cast<int64_t>(cpu::Kind::exit);
    const bool convolution = s[kind] == static_cast<int64_t>(cpu::Kind::convolution);
    if (s[kind] < 0 || s[kind] > static_cast<int64_t>(cpu::Kind::exit)) refuse(row, "there is no such kind of step");
    if (!inside(s[source], convolution ? 0 : 1) || !(exit ? s[target] >= 0 && s[target] <= num_exits : inside(s[target], 1)) ||
        (s[residual] != -1 && !inside(s[residual], 1))) {
      refuse(row, "there is no such map or exit");
    }
    if (s[section] < 0 || s[section] >= static_cast<int64_t>(network.sections.size())) refuse(row, "there is no such section");
    const cpu::Map& from = network.maps[s[source]];
    const int64_t to_section = exit ? from.section : network.maps[s[target]].section;
    const bool entry = from.section != s[section];
    if (to_section != s[section] || (entry && from.section != s[section] - 1) || (exit && entry) ||
        (s[residual] != -1 && network.maps[s[residual]].section != s[section]) || (s[source] == 0 && s[section] != 0)) {
      refuse(row, "its maps are of other sections");
    }
    const bool windows = convolution || s[kind] == static_cast<int64_t>(cpu::Kind::max_pool);
    if (windows && (s[kernel] < 1 || s[stride] < 1 || s[padding] < 0 || s[padding] > s[kernel] || (convolution && s[stride] > 2))) {
      refuse(row, "there is no kernel for this window");
    }
    const bool fits = s[kernel] == 3 && s[stride] == 1 && s[padding] == 1 && s[source] != 0 && !network.bfloat16;
    if (s[winograd] != 0 && !(convolution && fits && (s[winograd] == 2 || s[winograd] == 4))) {
      refuse(row, "Winograd is for float32 3×3 convolutions of stride 1 and padding 1, tiles of 2 or 4");
    }
    if (!convolution && !exit && (from.channels != network.maps[s[target]].channels)) refuse(row, "it cannot change channels");
    cpu::Step step{};
    step.kind = static_cast<cpu::Kind>(s[kind]);
    step.source = s[source];
    step.target = s[target];
    step.residual = s[residual];
    step.relu = s[relu] != 0;
    step.flatten = exit && s[kernel] != 0;
    step.kernel = s[kernel];
    step.stride = s[stride];
    step.padding = s[padding];
    step.winograd = s[winograd];
    step.section = s[section];
    step.entry = entry;
    cpu::Section& own = network.sections[s[section]];
    (entry ? own.entry : own.body).push_back(step);
  }

  // Points the steps at their weights, in the order of the rows; sizes of maps must be known.
  void point() {
    std::vector<std::size_t> entries(network.sections.size()), bodies(network.sections.size());
    for (int64_t row = 0; row < rows(); ++row) {
      const int64_t* const s = at(row);
      cpu::Section& own = network.sections[s[section]];
      const bool entry = network.maps[s[source]].section != s[section];
      cpu::Step& step = entry ? own.entry[entries[s[section]]++] : own.body[bodies[s[section]]++];
      const cpu::Map& from = network.maps[step.source];
      const int64_t outputs = step.kind == cpu::Kind::exit
                                  ? (network.num_classes + cpu::kBlock) / cpu::kBlock * cpu::kBlock
                                  : network.maps[step.target].blocks * cpu::kBlock;
      const int64_t size = cpu::packed_size(step, network.maps, network.num_classes, network.bfloat16);
      if (step.kind != cpu::Kind::max_pool &&
          (s[packed_place] < 0 || s[packed_place] > packed.numel() - outputs - size)) {
        refuse(row, "its weights lie outside of packed");
      }
      if (step.residual >= 0) {
        const cpu::Map &a = network.maps[step.residual], &b = network.maps[step.target];
        if (a.channels != b.channels || a.height != b.height || a.width != b.width || a.row_pitch != b.row_pitch ||
            a.halo != b.halo) {
          refuse(row, "its residual has another shape");
        }
      }
      step.bias = packed.const_data_ptr<float>() + s[packed_place];
      step.weight = step.bias + outputs;
      if (step.kind == cpu::Kind::convolution && from.channels < 1) refuse(row, "it has no channels");
    }
  }
};

Tensor empty(std::vector<int64_t> sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes[1]);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void parallel(int64_t n, void (*work)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i, context);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> resident_forward(const Tensor& images, const Tensor& steps, const Tensor& maps,
                                                    const Tensor& groups, const Tensor& weights, const Tensor& packed,
                                                    const Tensor& thresholds, const std::string& criterion,
                                                    int64_t num_classes, bool bfloat16, int64_t threads,
                                                    const std::optional<Tensor>& seconds) {
  check_dtype("images", images, ScalarType::Float, "float32");
  check_dtype("packed", packed, ScalarType::Float, "float32");
  check_dtype("thresholds", thresholds, ScalarType::Float, "float32");
  if (images.dim() != 4) fail("images has shape ", shape(images), "; expected [N, C, H, W]");
  if (thresholds.dim() != 1) fail("thresholds has shape ", shape(thresholds), "; expected [exits]");
  if (packed.dim() != 1 || !packed.is_contiguous()) fail("packed has shape ", shape(packed), "; expected one dimension");
  if (num_classes < 1 || threads < 0) {
    fail("num_classes = ", num_classes, " must be at least 1, threads = ", threads, " at least 0");
  }
  if (steps.dim() != 2 || steps.size(1) != kColumns || steps.size(0) == 0) {
    fail("steps has shape ", shape(steps), "; expected [S, ", kColumns, "]");
  }
  if (maps.dim() != 2 || maps.size(1) != 2 || maps.size(0) == 0) fail("maps has shape ", shape(maps), "; expected [M, 2]");
  if (groups.dim() != 1 || groups.size(0) == 0) fail("groups has shape ", shape(groups), "; expected [sections]");
  if (bfloat16 && cpu::instruction_set() != cpu::InstructionSet::avx512_bf16) {
    fail("bfloat16 needs AVX512-BF16, which this processor lacks or a variable holds back; use float32");
  }
  const std::vector<int64_t> step_values = integers("steps", steps), map_values = integers("maps", maps);

  cpu::Network network{bfloat16, num_classes, parse_criterion(criterion), {}, {}};
  for (const int64_t group : integers("groups", groups)) {
    if (group < 1 || group > 64) fail("groups has ", group, "; expected 1 … 64");
    network.sections.push_back({group, 0, {}, {}});
  }
  for (std::size_t i = 0; i < map_values.size(); i += 2) {
    cpu::Map map{};
    map.channels = map_values[i];
    map.section = map_values[i + 1];
    if (map.channels < 1 || (i == 0 ? map.section != -1 : map.section < 0) ||
        map.section >= static_cast<int64_t>(network.sections.size())) {
      fail("maps[", i / 2, "] = [", map.channels, ", ", map.section, "]; expected channels and a section, the image first");
    }
    network.maps.push_back(map);
  }
  if (images.size(1) != network.maps[0].channels) {
    fail("images has shape ", shape(images), "; expected ", network.maps[0].channels, " channels");
  }
  Program program{step_values, packed, network};
  for (int64_t row = 0; row < program.rows(); ++row) program.read(row, thresholds.size(0));
  const auto& last = network.sections.back().body;
  if (last.empty() || last.back().kind != cpu::Kind::exit || last.back().target != thresholds.size(0)) {
    fail("steps ends with no final exit");
  }
  if (!cpu::lay_out(network, images.size(2), images.size(3))) {
    fail("images has shape ", shape(images), "; these are too small for the network");
  }
  program.point();

  const int64_t samples = images.size(0);
  Tensor logits = empty({samples, num_classes}, aoti_torch_dtype_float32());
  Tensor confidence = empty({samples}, aoti_torch_dtype_float32());
  Tensor exits = empty({samples}, aoti_torch_dtype_int64());
  std::vector<float> limits;
  for (int64_t i = 0; i < thresholds.size(0); ++i) {
    limits.push_back(thresholds.const_data_ptr<float>()[i * thresholds.stride(0)]);
  }
  cpu::Batch batch{images.const_data_ptr<float>(),
                   samples,
                   {images.stride(0), images.stride(1), images.stride(2), images.stride(3)},
                   limits.data(),
                   logits.mutable_data_ptr<float>(),
                   confidence.mutable_data_ptr<float>(),
                   exits.mutable_data_ptr<int64_t>(),
                   nullptr};
  if (threads == 0) threads = torch::stable::get_num_threads();
  if (seconds) {
    check_dtype("seconds", *seconds, ScalarType::Double, "float64");
    check_shape("seconds", *seconds, {groups.size(0)}, "[sections]");
    if (!seconds->is_contiguous() || threads != 1) fail("seconds are counted with threads=1 only, in contiguous memory");
    batch.seconds = seconds->mutable_data_ptr<double>();
  }
  if (samples > 0) cpu::resident_forward(network, batch, threads, parallel);
  return {logits, confidence, exits};
}

std::string instruction_set() {
  constexpr std::array<const char*, 4> kNames = {"portable", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<std::size_t>(cpu::instruction_set())];
}

}  // namespace eefast
