// The CUDA side of eefast::resident_forward: places the maps in shared memory, queues the kernel.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "cuda/resident.h"
#include "current_stream.h"
#include "known_networks.h"
#include "ops.h"
#include "resident_program.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

int planes_of(const Map& map) { return static_cast<int>((map.channels + 15) / 16 * 2); }
int frame(const Map& map) { return cuda::frame_of(static_cast<int>(std::max(map.height, map.width))); }

cuda::Action action(const ResidentSource& source, const Step& step) {
  if (step.activation != Activation::none) refuse(source, step.row, "on CUDA there is no activation but ReLU");
  if (step.groups > 1) refuse(source, step.row, "on CUDA there are no groups");
  if (step.rows != step.kernel) refuse(source, step.row, "on CUDA windows are square");
  const bool three = step.kernel == 3 && step.padding == 1, one = step.kernel == 1 && step.padding == 0;
  switch (step.kind) {
    case Kind::affine: return cuda::Action::affine;
    case Kind::exit:
      if (step.flatten) refuse(source, step.row, "on CUDA exits take the mean of a map");
      return cuda::Action::exit;
    case Kind::convolution:
      if (step.source == 0 && three && step.stride == 1 && step.residual < 0) return cuda::Action::stem;
      if (step.source != 0 && three && step.stride == 1) return cuda::Action::convolution;
      if (step.source != 0 && three) return cuda::Action::convolution_down;
      if (step.source != 0 && one && step.stride == 2) return cuda::Action::projection_down;
      break;
    default: break;
  }
  refuse(source, step.row, "there is no CUDA kernel for this step");
}

// The widths with separate functions.
cuda::Action of_6n_plus_2(const cuda::Step& step) {
  if (step.action != cuda::Action::convolution || step.source_planes != step.planes) return step.action;
  if (step.frame == 34 && step.planes == 2) return cuda::Action::convolution_16;
  if (step.frame == 18 && step.planes == 4) return cuda::Action::convolution_32;
  if (step.frame == 10 && step.planes == 8) return cuda::Action::convolution_64;
  return step.action;
}

// When a map is written first and used last, in steps; the image comes before the first.
struct Life {
  int64_t map, bytes, begin, end;
};

std::vector<Life> lives(const std::vector<Step>& steps, const std::vector<Map>& maps) {
  std::vector<Life> found;
  for (std::size_t m = 0; m < maps.size(); ++m) {
    Life life{static_cast<int64_t>(m), (m == 0 ? 1 : planes_of(maps[m])) * cuda::plane_bytes(frame(maps[m])),
              m == 0 ? -1 : std::numeric_limits<int64_t>::max(), -1};
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      const bool writes = step.kind != Kind::exit && step.target == life.map;
      if (!writes && step.source != life.map && step.residual != life.map) continue;
      if (writes) life.begin = std::min(life.begin, static_cast<int64_t>(i));
      life.end = static_cast<int64_t>(i);
    }
    if (life.end >= 0) found.push_back(life);
  }
  return found;
}

// Offset of each map; those in use at the same time do not overlap. Returns the bytes of all.
int64_t place_maps(std::vector<Life> all, std::vector<int64_t>& offsets) {
  std::stable_sort(all.begin(), all.end(), [](const Life& a, const Life& b) { return a.bytes > b.bytes; });
  std::vector<Life> placed;
  int64_t total = 0;
  for (const Life& life : all) {
    int64_t offset = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Life& other : placed) {
        const int64_t at = offsets[other.map];
        if (life.end < other.begin || other.end < life.begin) continue;
        if (offset >= at + other.bytes || at >= offset + life.bytes) continue;
        offset = at + other.bytes;
        moved = true;
      }
    }
    offsets[life.map] = offset;
    placed.push_back(life);
    total = std::max(total, offset + life.bytes);
  }
  return total;
}

// Bytes of packed weights and their bias, in the order of eefast/planning/packing.py.
int64_t packed_bytes(const cuda::Step& step, int num_classes) {
  const int64_t outputs = step.planes * 8, inputs = step.source_planes * 8;
  switch (step.action) {
    case cuda::Action::stem: return outputs * 4 + 80 * outputs * 2;
    case cuda::Action::convolution_16:
    case cuda::Action::convolution_32:
    case cuda::Action::convolution_64:
    case cuda::Action::convolution:
    case cuda::Action::convolution_down: return outputs * 4 + 9 * inputs * outputs * 2;
    case cuda::Action::projection_down: return outputs * 4 + inputs * outputs * 2;
    case cuda::Action::affine: return outputs * 8;
    case cuda::Action::exit: return ((num_classes + 16) / 16 * 16 + (num_classes + 1) * inputs) * 4;
  }
  return 0;
}

// A step as the kernel takes it. written: whether the step's target has been written before.
cuda::Step packed_step(const ResidentSource& source, const Network& network, const Step& step,
                       const std::vector<int64_t>& offsets, bool written) {
  const std::vector<Map>& maps = network.maps;
  cuda::Step packed{};
  packed.action = action(source, step);
  const bool exits = step.kind == Kind::exit;
  const Map &from = maps[step.source], &to = exits ? from : maps[step.target];
  if (exits && step.target > std::numeric_limits<int16_t>::max()) refuse(source, step.row, "on CUDA exits are few");
  if (to.channels > cuda::kMaxChannels) refuse(source, step.row, "on CUDA a map has at most 64 channels");
  if (step.kind == Kind::affine && from.channels != to.channels)
    refuse(source, step.row, "on CUDA it cannot change channels");
  if (step.winograd != 0) refuse(source, step.row, "there is no Winograd on CUDA");
  packed.frame = static_cast<uint8_t>(frame(to));
  packed.height = static_cast<uint8_t>(to.height);
  packed.width = static_cast<uint8_t>(to.width);
  packed.source_frame = static_cast<uint8_t>(frame(from));
  packed.source_planes = static_cast<uint8_t>(step.source == 0 ? 1 : planes_of(from));
  packed.planes = static_cast<uint8_t>(planes_of(to));
  packed.relu = step.relu;
  packed.action = of_6n_plus_2(packed);
  packed.last = exits && step.target == source.num_exits;
  packed.exit = static_cast<int16_t>(exits ? step.target : 0);
  packed.source = static_cast<uint16_t>(offsets[step.source] / 16);
  packed.target = static_cast<uint16_t>(exits ? 0 : offsets[step.target] / 16);
  packed.residual = step.residual < 0 ? cuda::kNone : static_cast<uint16_t>(offsets[step.residual] / 16);
  packed.clear = !exits && !written;
  if (step.residual >= 0 && (maps[step.residual].channels != to.channels || maps[step.residual].height != to.height ||
                             maps[step.residual].width != to.width)) {
    refuse(source, step.row, "its residual has another shape");
  }
  if (step.place < 0 || step.place % 4 != 0 ||
      packed_bytes(packed, static_cast<int>(network.num_classes)) / 4 > source.packed.numel() - step.place) {
    refuse(source, step.row, "its weights are outside of packed");
  }
  packed.weight = static_cast<uint32_t>(step.place / 4);
  return packed;
}

cuda::Network on_cuda(const ResidentSource& source) {
  const Network network = read_network(source);
  const std::vector<Map>& maps = network.maps;
  if (network.num_classes > cuda::kMaxClasses) {
    fail("num_classes = ", network.num_classes, "; on CUDA expected at most ", cuda::kMaxClasses);
  }
  if (maps[0].channels > cuda::kMaxImageChannels || std::max(maps[0].height, maps[0].width) > cuda::kMaxSide) {
    fail("images of ", maps[0].channels, "×", maps[0].height, "×", maps[0].width, "; on CUDA expected at most ",
         cuda::kMaxImageChannels, "×", cuda::kMaxSide, "×", cuda::kMaxSide);
  }
  std::vector<Step> steps;
  for (const Section& section : network.sections) {
    steps.insert(steps.end(), section.entry.begin(), section.entry.end());
    steps.insert(steps.end(), section.body.begin(), section.body.end());
  }
  if (steps.size() > cuda::kMaxSteps) fail("steps has ", steps.size(), " rows; on CUDA at most ", cuda::kMaxSteps);
  std::vector<int64_t> offsets(maps.size());
  cuda::Network found{};
  found.packed = source.place;
  found.criterion = network.criterion;
  found.classes = static_cast<int>(network.num_classes);
  found.steps = static_cast<int>(steps.size());
  const int64_t map_bytes = place_maps(lives(steps, maps), offsets);
  if (map_bytes >= 1 << 20) fail("the maps take ", map_bytes, " bytes; shared memory has far less");
  found.map_bytes = static_cast<int>(map_bytes);
  found.image = static_cast<int>(offsets[0]);
  found.image_frame = static_cast<uint8_t>(frame(maps[0]));
  found.bfloat16 = source.precision == Precision::bfloat16;
  std::vector<bool> written(maps.size());
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const bool exits = steps[i].kind == Kind::exit;
    found.step[i] = packed_step(source, network, steps[i], offsets, !exits && written[steps[i].target]);
    if (!exits) written[steps[i].target] = true;
  }
  return found;
}

cuda::Pixel pixel(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::Float: return cuda::Pixel::float32;
    case ScalarType::Half: return cuda::Pixel::float16;
    case ScalarType::BFloat16: return cuda::Pixel::bfloat16;
    case ScalarType::Byte: return cuda::Pixel::uint8;
    default: fail("images is ", toString(images.scalar_type()), "; expected float32, float16, bfloat16 or uint8");
  }
}

cuda::Network with_limits(cuda::Network network, const Tensor& thresholds, const std::string& criterion,
                          const std::optional<Tensor>& rule) {
  check_rule(criterion, rule ? &*rule : nullptr, {thresholds.size(0) + 1, kRuleNumbers});
  if (rule && !rule->is_contiguous()) fail("rule is not contiguous; call .contiguous()");
  network.rule = rule ? rule->const_data_ptr<float>() : nullptr;
  if (thresholds.size(0) == 0) return network;
  network.thresholds = thresholds.const_data_ptr<float>();
  network.threshold_stride = thresholds.stride(0);
  network.thresholds_of_each = thresholds.dim() == 2;
  network.threshold_image_stride = network.thresholds_of_each ? thresholds.stride(1) : 0;
  return network;
}

}  // namespace

std::tuple<Tensor, int64_t> resident_network(const Tensor& images, const Tensor& steps, const Tensor& maps,
                                             const Tensor& groups, const Tensor& packed, const Tensor& thresholds,
                                             const std::string& criterion, int64_t num_classes, bool bfloat16,
                                             const std::optional<Tensor>& rule) {
  const ResidentSource source =
      read_tables(images, steps, maps, groups, packed, thresholds, criterion, num_classes, float_precision(bfloat16));
  const cuda::Network network = with_limits(on_cuda(source), thresholds, criterion, rule);
  const auto size = static_cast<int64_t>(sizeof network);
  Tensor bytes = empty("the network", {size}, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0);
  std::memcpy(bytes.mutable_data_ptr(), &network, size);
  return {bytes, static_cast<int64_t>(cuda::shared_bytes(network))};
}

std::tuple<Tensor, Tensor, Tensor> resident_forward_cuda(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const std::string& criterion, int64_t num_classes, bool bfloat16,
    int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& normalization,
    const std::optional<Tensor>& rule, const std::optional<Tensor>& features, const std::optional<Tensor>& before) {
  check_there("images", images);
  check_there("packed", packed);
  check_there("thresholds", thresholds);
  if (!images.is_cuda()) fail("images is not on a CUDA device, but another argument is");
  check_device("packed", packed, "images", images);
  check_device("thresholds", thresholds, "images", images);
  if (rule) check_device("rule", *rule, "images", images);
  if (seconds) fail("seconds are counted on the CPU only");
  if (features) fail("features are stored on the CPU only");
  if (before) fail("a run begins with the answer so far on the CPU only");
  if (images.dim() == 4 && images.size(0) > std::numeric_limits<int>::max() / 2)
    fail("images has too many rows; split it");
  ResidentSource source =
      read_tables(images, steps, maps, groups, packed, thresholds, criterion, num_classes, float_precision(bfloat16));
  if (normalization) {
    check_device("normalization", *normalization, "images", images);
    check_dtype("normalization", *normalization, ScalarType::Float, "float32");
    check_shape("normalization", *normalization, {2, images.size(1)}, "[2, C]");
    if (!normalization->is_contiguous()) fail("normalization is not contiguous; call .contiguous()");
  }
  const cuda::Network network =
      with_limits(known_networks<cuda::Network>().of(std::move(source), on_cuda)->second, thresholds, criterion, rule);
  const int64_t samples = images.size(0);
  const int32_t device = images.get_device_index(), place = aoti_torch_device_type_cuda();
  Tensor logits = empty("logits", {samples, num_classes}, aoti_torch_dtype_float32(), place, device);
  Tensor confidence = empty("confidence", {samples}, aoti_torch_dtype_float32(), place, device);
  Tensor exits = empty("exits", {samples}, aoti_torch_dtype_int64(), place, device);
  if (samples == 0) return {logits, confidence, exits};
  Tensor next = empty("the queue", {1}, aoti_torch_dtype_int32(), place, device);
  const cuda::Batch batch{images.const_data_ptr(),
                          {images.stride(0), images.stride(1), images.stride(2), images.stride(3)},
                          pixel(images),
                          static_cast<int>(samples),
                          static_cast<int>(images.size(1)),
                          static_cast<int>(images.size(2)),
                          static_cast<int>(images.size(3)),
                          normalization ? normalization->const_data_ptr<float>() : nullptr,
                          next.mutable_data_ptr<int32_t>(),
                          logits.mutable_data_ptr<float>(),
                          confidence.mutable_data_ptr<float>(),
                          exits.mutable_data_ptr<int64_t>()};
  if (const char* const error = cuda::launch_resident({network, batch}, device, current_stream(device))) {
    fail("the resident CUDA kernel with ", cuda::shared_bytes(network), " bytes of shared memory: ", error);
  }
  return {logits, confidence, exits};
}

}  // namespace eefast
