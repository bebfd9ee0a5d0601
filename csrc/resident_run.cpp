// The CPU side of both resident ops: points a network at its packed weights, hands it to the CPU engine.
#include "resident_run.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/resident.h"
#include "known_networks.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMaxThreads = 1 << 10;

// Whether scaled sums of an int8 convolution may be too large for 32 bits.
bool is_huge(const Step& step, const Map& from, const Map& to) {
  const int64_t outputs = to.blocks * kBlock, width = direct_width(to.blocks);
  const int64_t taps = int8_taps(step) * ((from.channels + 3) / 4), starts = int8_starts(step);
  const auto* const start = reinterpret_cast<const int32_t*>(step.bias);
  const float *const scale = step.bias + starts * outputs, *const ratio = scale + outputs;
  const auto* weight = reinterpret_cast<const int8_t*>(ratio + kBlock);
  std::vector<double> sums(outputs);
  for (int64_t i = 0; i < starts * outputs; ++i) sums[i % outputs] += std::abs(static_cast<double>(start[i]));
  for (int64_t group = 0; group < outputs; group += width) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < 4 * width; ++i) sums[group + i / 4] += 255.0 * std::abs(static_cast<double>(*weight++));
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    // NaN, which is in no network, is no small number either.
    if (!(sums[o] * std::abs(scale[o]) + 255.0 * std::abs(*ratio) < 0x1p31)) return true;
  }
  return false;
}

// Points the steps at their weights, in the order of the rows.
void point(Network& network, const ResidentSource& source) {
  for (Section& section : network.sections) {
    for (std::vector<Step>* steps : {&section.entry, &section.body}) {
      for (Step& step : *steps) {
        if (step.kind == Kind::scale) {
          const Map& gate = network.maps[step.residual];
          if (gate.height != 1 || gate.width != 1) refuse(source, step.row, "its residual is no map of one pixel");
        }
        if (step.kind != Kind::convolution && step.kind != Kind::affine && step.kind != Kind::exit) continue;
        const int64_t outputs = step.kind == Kind::exit ? (network.num_classes + kBlock) / kBlock * kBlock
                                                        : network.maps[step.target].blocks * kBlock;
        const int64_t size = packed_size(step, network.maps, network.num_classes, network.precision);
        if (step.place < 0 || step.place > source.packed.numel() - outputs - size) {
          refuse(source, step.row, "its weights are outside of packed");
        }
        if (step.residual >= 0) {
          const Map &a = network.maps[step.residual], &b = network.maps[step.target];
          if (a.channels != b.channels || a.height != b.height || a.width != b.width || a.row_pitch != b.row_pitch ||
              a.halo != b.halo) {
            refuse(source, step.row, "its residual has another shape");
          }
        }
        step.bias = source.place + step.place;
        step.weight = step.bias + outputs;
        if (network.precision == Precision::int8 && step.kind == Kind::convolution) {
          step.huge = is_huge(step, network.maps[step.source], network.maps[step.target]);
        }
      }
    }
  }
}

void parallel(int64_t n, void (*work)(int64_t, void*), void* context) {
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i, context);
  });
}

// Where the features of all samples go.
void* checked_features(const Network& network, const Tensor& features, int64_t samples) {
  if (network.stored < 0) fail("features are given, but no step stores a map");
  check_there("features", features);
  check_stored("features", features);
  const bool int8 = network.precision == Precision::int8;
  check_dtype("features", features, int8 ? ScalarType::Byte : ScalarType::Float, int8 ? "uint8" : "float32");
  const Map& map = network.maps[network.stored];
  const int64_t channels = features.dim() == 4 ? features.size(1) : 0;
  if (features.dim() != 4 || features.size(0) != samples || channels < 1 || channels > map.channels ||
      features.size(2) != map.height || features.size(3) != map.width) {
    fail("features has shape ", shape(features), "; expected ",
         brackets(std::vector<int64_t>{samples, map.channels, map.height, map.width}), " or fewer channels");
  }
  const std::vector<int64_t> dense{map.height * map.width * channels, 1, map.width * channels, channels};
  const std::vector<int64_t> sizes{samples, channels, map.height, map.width};
  for (int64_t i = 0; i < 4; ++i) {
    if (sizes[i] > 1 && features.stride(i) != dense[i])
      fail("features has strides ", brackets(features.strides()), "; expected channels-last memory");
  }
  return int8 ? static_cast<void*>(features.mutable_data_ptr<uint8_t>()) : features.mutable_data_ptr<float>();
}

// The answers so far [samples, num_classes + 1], logits first, as results that exits go on from.
void begin_with(const Tensor& before, float* logits, float* confidence, int64_t samples, int64_t num_classes) {
  check_there("before", before);
  check_stored("before", before);
  check_dtype("before", before, ScalarType::Float, "float32");
  check_shape("before", before, {samples, num_classes + 1}, "[N, K + 1]");
  for (int64_t s = 0; s < samples; ++s) {
    const float* const row = before.const_data_ptr<float>() + s * before.stride(0);
    for (int64_t k = 0; k < num_classes; ++k) logits[s * num_classes + k] = row[k * before.stride(1)];
    confidence[s] = row[num_classes * before.stride(1)];
  }
}

}  // namespace

std::shared_ptr<const std::pair<ResidentSource, Network>> pointed_network(ResidentSource source) {
  return known_networks<Network>().of(std::move(source), [](const ResidentSource& read) {
    Network network = read_network(read);
    point(network, read);
    return network;
  });
}

std::vector<float> rule_numbers(const ResidentSource& source, const std::optional<Tensor>& rule) {
  check_rule(source.criterion, rule ? &*rule : nullptr, {source.num_exits + 1, kRuleNumbers});
  std::vector<float> numbers;
  for (int64_t i = 0; rule && i < (source.num_exits + 1) * kRuleNumbers; ++i) {
    numbers.push_back(
        rule->const_data_ptr<float>()[i / kRuleNumbers * rule->stride(0) + i % kRuleNumbers * rule->stride(1)]);
  }
  return numbers;
}

std::vector<float> image_scaling(const ResidentSource& source, const Tensor& image) {
  check_there("image", image);
  check_stored("image", image);
  check_dtype("image", image, ScalarType::Float, "float32");
  check_shape("image", image, {2, source.channels}, "[2, C]");
  std::vector<float> scaling;
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t c = 0; c < source.channels; ++c) {
      scaling.push_back(image.const_data_ptr<float>()[row * image.stride(0) + c * image.stride(1)]);
    }
  }
  return scaling;
}

std::tuple<Tensor, Tensor, Tensor> run_resident(ResidentSource read, const Tensor& images, const Tensor& groups,
                                                const Tensor& thresholds, const std::optional<Tensor>& rule,
                                                int64_t threads, const std::optional<Tensor>& seconds,
                                                const float* scaling, const std::optional<Tensor>& features,
                                                const std::optional<Tensor>& before) {
  if (threads < 0 || threads > kMaxThreads) fail("threads = ", threads, "; expected 0 … ", kMaxThreads);
  const int64_t num_classes = read.num_classes;
  const std::vector<float> numbers = rule_numbers(read, rule);
  const auto known = pointed_network(std::move(read));
  const Network& network = known->second;

  const int64_t samples = images.size(0);
  const int32_t cpu = aoti_torch_device_type_cpu();
  Tensor logits = empty("logits", {samples, num_classes}, aoti_torch_dtype_float32(), cpu, 0);
  Tensor confidence = empty("confidence", {samples}, aoti_torch_dtype_float32(), cpu, 0);
  Tensor exits = empty("exits", {samples}, aoti_torch_dtype_int64(), cpu, 0);
  const bool of_each = thresholds.dim() == 2;
  std::vector<float> limits;
  limits.reserve(thresholds.numel());
  for (int64_t s = 0; s < (of_each ? samples : 1); ++s) {
    for (int64_t i = 0; i < thresholds.size(0); ++i) {
      limits.push_back(
          thresholds.const_data_ptr<float>()[i * thresholds.stride(0) + (of_each ? s * thresholds.stride(1) : 0)]);
    }
  }
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  cpu::Batch batch{bytes ? static_cast<const void*>(images.const_data_ptr<uint8_t>()) : images.const_data_ptr<float>(),
                   bytes,
                   scaling,
                   samples,
                   {images.stride(0), images.stride(1), images.stride(2), images.stride(3)},
                   limits.data(),
                   of_each,
                   rule ? numbers.data() : nullptr,
                   logits.mutable_data_ptr<float>(),
                   confidence.mutable_data_ptr<float>(),
                   exits.mutable_data_ptr<int64_t>(),
                   nullptr};
  if (threads == 0) threads = torch::stable::get_num_threads();
  if (seconds) {
    check_dtype("seconds", *seconds, ScalarType::Double, "float64");
    check_stored("seconds", *seconds);
    check_shape("seconds", *seconds, {groups.size(0)}, "[sections]");
    if (!seconds->is_contiguous() || threads != 1)
      fail("seconds are counted with threads=1 only, in contiguous memory");
    batch.seconds = seconds->mutable_data_ptr<double>();
  }
  if (features) {
    check_apart({{"features", &*features}}, {{"images", &images}});
    batch.features = checked_features(network, *features, samples);
    batch.stored_channels = features->size(1);
  } else if (network.stored >= 0) {
    fail("steps store a map, but there are no features to write it to");
  }
  if (before) {
    if (!rule) fail("before is given, but no rule that reads it");
    begin_with(*before, batch.logits, batch.confidence, samples, num_classes);
  }
  if (network.loads && network.precision == Precision::int8 && !bytes) fail("images are loaded as uint8");
  if (samples > 0) cpu::resident_forward(network, batch, threads, parallel);
  return {logits, confidence, exits};
}

}  // namespace eefast
