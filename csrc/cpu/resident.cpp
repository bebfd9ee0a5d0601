// The resident engine: every worker takes samples from a queue and carries each to its exit, with maps in its cache.
//
// map[target] = step(map[source]), + map[residual], ReLU, section by section; at an exit as in exit_head_lanes.h
#include "cpu/resident.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <list>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/resident_kernels.h"
#include "cpu/room.h"
#include "cpu/team.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace eefast::cpu {
namespace {

// Tiles of one pass through the three parts of a Winograd convolution: as many as the first-level cache holds for 16
// channels, and enough for one pass over the weights for more. Tiles of rows are of fewer numbers.
int64_t chunk_tiles(const Step& step, const Map& from) {
  if (step.rows == 1) return 32;
  return from.blocks == 1 ? 8 : 16;
}

// Weights of one convolution up to which every core may read all; of more each reads one part only.
constexpr int64_t kCacheableWeights = 256 * 1024;

constexpr int64_t kPage = 1 << 21;

// Lets the large pages that fit into fresh memory be such: a fault for each small one takes longer than to fill it.
void advise_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A thread's memory for maps of one layout. It stays with the thread, since fresh memory costs a page fault for every
// page. Large pages: small ones, scattered as they come, evict one another from the cache.
struct Arena {
  std::vector<int64_t> layout;
  int64_t bytes;
  char* memory;

  Arena(std::vector<int64_t> of, int64_t size) : layout(std::move(of)), bytes(round_up(size, kPage)) {
    memory = static_cast<char*>(std::aligned_alloc(kPage, bytes));
    if (memory == nullptr) throw no_memory("a network's maps", size);
    advise_large_pages(memory, bytes);
    std::memset(memory, 0, size);  // the borders of the maps stay zero from here on
  }
  ~Arena() { std::free(memory); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
};

// Those that a thread used last: of the parts of a network, which run in turn, each has its own.
class Arenas {
 public:
  // Memory of this layout, and whether it is new.
  std::pair<char*, bool> of(const std::vector<int64_t>& layout, int64_t size) {
    int64_t bytes = round_up(size, kPage);
    for (auto arena = kept_.begin(); arena != kept_.end(); ++arena) {
      if (arena->layout == layout) {
        kept_.splice(kept_.begin(), kept_, arena);
        return {arena->memory, false};
      }
      bytes += arena->bytes;
    }
    while (!kept_.empty() && (kept_.size() == kMost || bytes > kMostBytes)) {
      bytes -= kept_.back().bytes;
      kept_.pop_back();
    }
    kept_.emplace_front(layout, size);
    return {kept_.front().memory, true};
  }

 private:
  static constexpr std::size_t kMost = 8;
  static constexpr int64_t kMostBytes = 1 << 26;

  std::list<Arena> kept_;
};

struct Job;

struct Worker {
  Job* job;
  Team* team;
  // Per section: the slots, how many of them hold a waiting sample, those of the samples that run.
  std::vector<std::vector<Slot>> slots;
  std::vector<int64_t> used;
  std::vector<std::vector<Slot*>> live;
  char* planes;
  float* frequencies;
  float* product;
  // For kExitSamples samples each.
  float* values;
  float* logits;
  // Addresses of the samples' maps of the step that runs.
  std::vector<void*> from, to, residual;
};

struct Job {
  const Network& network;
  const Batch& batch;
  const Kernels& kernels;
  const ImageRow image_row = select_image_row();
  int64_t frequency_floats, value_floats, logit_floats;
  std::vector<Team> teams;
  std::atomic<int64_t> next{0}, stored{0};

  Job(const Network& net, const Batch& images, int64_t threads)
      : network(net), batch(images), kernels(select_kernels(net.precision)), teams(threads) {
    frequency_floats = 0;
    value_floats = 4 * net.maps[0].width;
    // Also a row of an image.
    logit_floats = std::max(round_up(net.num_classes + 1, kBlock), net.maps[0].width + kBlock);
    for (const Section& section : net.sections) {
      for (const std::vector<Step>* steps : {&section.entry, &section.body}) {
        for (const Step& step : *steps) {
          const Map& from = net.maps[step.source];
          const int64_t pixels = step.kind == Kind::exit && step.flatten ? from.height * from.width : 1;
          value_floats = std::max(value_floats, from.blocks * kBlock * pixels);
          if (step.winograd == 0) continue;
          if (net.precision == Precision::int8) {
            frequency_floats = std::max(frequency_floats, kTransformedPlanes * transformed_plane(from) / 4);
            continue;
          }
          const int64_t blocks = std::max(from.blocks, net.maps[step.target].blocks);
          const int64_t pitch = blocks * chunk_tiles(step, from) * kBlock + kBlock;
          frequency_floats = std::max(frequency_floats, frequencies_of(step) * pitch);
        }
      }
    }
  }

  int64_t element() const { return bytes_of(network.precision); }
  bool int8() const { return network.precision == Precision::int8; }
};

// What surrounds int8 maps is their code for zero; nothing writes there later.
void fill_maps(const Network& net, const std::vector<std::vector<int64_t>>& places, char* base) {
  for (const Map& map : net.maps) {
    if (map.section < 0 || map.zero == 0) continue;
    for (const int64_t place : places[map.section]) {
      std::memset(base + place + map.offset, static_cast<int>(map.zero), map.size);
    }
  }
}

// The code nearest to what `shift` says is zero, of every channel.
void fill_image(const Map& map, const float* scaling, char* planes) {
  std::vector<uint8_t> pixel(map.block);
  for (int64_t c = 0; c < map.channels; ++c) {
    const float shift = scaling[map.channels + c];
    pixel[c] = shift > 0 ? static_cast<uint8_t>(std::nearbyint(std::min(shift, 255.0f))) : 0;
  }
  for (int64_t y = -map.halo; y < map.height + map.halo; ++y) {
    for (int64_t x = -map.halo; x < map.width + map.halo; ++x) {
      const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
      if (!inside) std::memcpy(planes + map.at(y, x), pixel.data(), map.block);
    }
  }
}

// Where a worker's parts are in its memory, in bytes.
struct Places {
  std::vector<std::vector<int64_t>> slots;  // per section
  int64_t planes, frequencies, product, values, logits, size = kLine;
  std::vector<int64_t> layout;  // what else two workers must have in common to use the same memory

  // slots: of a section.
  template <class Slots>
  Places(const Job& job, const Slots& slots_of) {
    const Network& net = job.network;
    const auto reserve = [&](int64_t bytes) {
      // Memory that different maps have in common modulo 4096 bytes would make loads wait for unrelated stores.
      const int64_t begin = size;
      size += round_up(bytes, 4096) + 5 * kLine;
      return begin;
    };
    layout = {job.element()};
    for (const Map& map : net.maps) {
      layout.insert(layout.end(),
                    {map.blocks, map.block, map.height, map.width, map.halo, map.row_pitch, map.offset, map.zero});
    }
    planes = reserve(net.maps[0].size * 4);
    for (const Section& section : net.sections) {
      const int64_t count = slots_of(section);
      layout.insert(layout.end(), {count, section.slot_size});
      slots.emplace_back();
      for (int64_t g = 0; g < count; ++g) slots.back().push_back(reserve(section.slot_size));
    }
    frequencies = reserve(job.frequency_floats * 4);
    product = reserve(job.frequency_floats * 4);
    values = reserve(job.value_floats * 4 * kExitSamples);
    logits = reserve(job.logit_floats * 4 * kExitSamples);
    layout.push_back(size);
  }
};

// fresh: whether the memory was never used.
Worker make_worker(Job& job, Team& team, const Places& places, char* base, bool fresh) {
  const Network& net = job.network;
  Worker worker{};
  worker.job = &job;
  worker.team = &team;
  worker.used.resize(net.sections.size());
  worker.live.resize(net.sections.size());
  // Reserved now: helpers would wait forever for a leader that runs out of memory on its way.
  for (std::size_t s = 0; s < net.sections.size(); ++s) {
    worker.live[s].reserve(net.sections[s].group);
    for (auto* maps : {&worker.from, &worker.to, &worker.residual}) maps->reserve(net.sections[s].group);
  }
  if (fresh && job.int8()) fill_maps(net, places.slots, base);
  for (const auto& section : places.slots) {
    worker.slots.emplace_back();
    for (const int64_t place : section) worker.slots.back().push_back({0, base + place});
  }
  worker.planes = base + places.planes;
  worker.frequencies = reinterpret_cast<float*>(base + places.frequencies);
  worker.product = reinterpret_cast<float*>(base + places.product);
  worker.values = reinterpret_cast<float*>(base + places.values);
  worker.logits = reinterpret_cast<float*>(base + places.logits);
  if (job.int8() && !net.loads) fill_image(net.maps[0], job.batch.scaling, worker.planes);
  return worker;
}

Worker make_worker(Job& job, Team& team) {
  static thread_local Arenas arenas;
  const Places places(job, [](const Section& section) { return section.group; });
  const auto [base, fresh] = arenas.of(places.layout, places.size);
  return make_worker(job, team, places, base, fresh);
}

// An image has no slot.
char* map_of(const Worker& worker, const Slot* slot, int64_t map) {
  return map == 0 ? worker.planes : slot->maps + worker.job->network.maps[map].offset;
}

// One channel of one row of an image.
template <class T>
const T* image_row_at(const Batch& batch, int64_t sample, int64_t c, int64_t y) {
  return static_cast<const T*>(batch.images) + sample * batch.strides[0] + c * batch.strides[1] + y * batch.strides[2];
}

// An image as codes; false where it has a NaN, which no code stands for.
bool load_codes(const Worker& worker, int64_t sample) {
  const Batch& batch = worker.job->batch;
  const Map& map = worker.job->network.maps[0];
  const int64_t step = batch.strides[3], width = map.width;
  const float *const multipliers = batch.scaling, *const shifts = multipliers + map.channels;
  uint8_t* const fours = reinterpret_cast<uint8_t*>(worker.logits);
  bool broken = false;
  for (int64_t y = 0; y < map.height; ++y) {
    uint8_t* const to = reinterpret_cast<uint8_t*>(worker.planes) + map.at(y, 0);
    if (batch.bytes) {
      for (int64_t c = 0; c < map.channels; ++c) {
        const uint8_t* const from = image_row_at<uint8_t>(batch, sample, c, y);
        for (int64_t x = 0; x < width; ++x) to[x * map.block + c] = from[x * step];
      }
      continue;
    }
    for (int64_t c = 0; c < map.channels; c += 4) {
      const int64_t channels = std::min<int64_t>(4, map.channels - c);
      const float* rows[4];
      for (int64_t k = 0; k < channels; ++k) {
        rows[k] = image_row_at<float>(batch, sample, c + k, y);
        if (step == 1) continue;
        float* const dense = worker.values + k * width;
        for (int64_t x = 0; x < width; ++x) dense[x] = rows[k][x * step];
        rows[k] = dense;
      }
      uint8_t* const pixels = map.block == 4 ? to : fours;
      broken |= worker.job->image_row(rows, channels, width, multipliers + c, shifts + c, pixels);
      if (pixels == to) continue;
      for (int64_t x = 0; x < width; ++x) std::memcpy(to + x * map.block + c, fours + 4 * x, 4);
    }
  }
  return !broken;
}

bool load_image(const Worker& worker, int64_t sample) {
  if (worker.job->int8()) return load_codes(worker, sample);
  const Batch& batch = worker.job->batch;
  const Map& map = worker.job->network.maps[0];
  float* const planes = reinterpret_cast<float*>(worker.planes);
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t y = 0; y < map.height; ++y) {
      const float* from = image_row_at<float>(batch, sample, c, y);
      float* const to = planes + c * map.block_pitch + map.at(y, 0);
      if (batch.strides[3] == 1) {
        std::memcpy(to, from, map.width * sizeof(float));
      } else {
        for (int64_t x = 0; x < map.width; ++x) to[x] = from[x * batch.strides[3]];
      }
    }
  }
  return true;
}

// One step on samples whose inputs are in the slots `from` and whose outputs go to `to`, maybe the same slots.
struct Layer {
  const Step& step;
  Slot* const* from;
  Slot* const* to;
  int64_t samples;
  Worker& worker;  // the leader

  const Network& network() const { return worker.job->network; }
  const Map& source() const { return network().maps[step.source]; }
  const Map& target() const { return network().maps[step.target]; }
  char* in(int64_t i) const { return map_of(worker, from[i], step.source); }
  char* out(int64_t i) const { return map_of(worker, to[i], step.target); }
  char* residual(int64_t i) const { return step.residual < 0 ? nullptr : map_of(worker, to[i], step.residual); }
};

// What computes rows of a convolution, and how many channels at a time.
std::pair<decltype(Kernels::rows), int64_t> rows_of(const Kernels& kernels, const Step& step, const Map& from,
                                                    const Map& to) {
  if (step.huge) return {kernels.huge_rows, direct_width(to.blocks)};
  if (is_depthwise(step, from, to)) return {kernels.depthwise, kBlock};
  if (narrow_groups(step, from, to) > 0) return {kernels.narrow, kBlock};
  if (step.groups > 1) return {kernels.grouped, grouped_width(step, to)};
  return {kernels.rows, direct_width(to.blocks)};
}

// The addresses of the samples' maps.
void find_maps(const Layer& layer) {
  Worker& worker = layer.worker;
  worker.from.clear();
  worker.to.clear();
  worker.residual.clear();
  for (int64_t i = 0; i < layer.samples; ++i) {
    worker.from.push_back(layer.in(i));
    worker.to.push_back(layer.out(i));
    worker.residual.push_back(layer.residual(i));
  }
}

// Whether a convolution is of maps of one pixel that stand for a whole map, and float32.
bool is_vector(const Layer& layer) {
  const Step& step = layer.step;
  const bool able = layer.source().pooled && layer.target().pooled && step.residual < 0 && step.groups <= 1;
  return able && layer.worker.job->kernels.vector != nullptr;
}

void run_vectors(const Layer& layer) {
  find_maps(layer);
  Worker& leader = layer.worker;
  const Map &from = layer.source(), &to = layer.target();
  const int64_t groups = to.blocks * kBlock / direct_width(to.blocks);
  const auto work = [&](int64_t group, Worker&) {
    for (int64_t i = 0; i < layer.samples; i += kVectorSamples) {
      leader.job->kernels.vector(layer.step, from, to, std::min(kVectorSamples, layer.samples - i),
                                 reinterpret_cast<float**>(leader.from.data()) + i,
                                 reinterpret_cast<float**>(leader.to.data()) + i, group);
    }
  };
  leader.team->share(groups, work, leader);
}

// Rows of maps up to this width are no whole strips.
constexpr int64_t kNarrow = 7;

bool is_points(const Layer& layer) {
  const Step& step = layer.step;
  const bool able = step.kernel == 1 && step.stride == 1 && step.padding == 0 && step.groups <= 1 && step.source != 0;
  return able && layer.target().width <= kNarrow && layer.worker.job->kernels.points != nullptr;
}

void run_points(const Layer& layer) {
  find_maps(layer);
  Worker& leader = layer.worker;
  const Map &from = layer.source(), &to = layer.target();
  const int64_t groups = to.blocks * kBlock / direct_width(to.blocks), helpers = leader.team->helpers();
  const int64_t pixels = layer.samples * to.height * to.width;
  // Every worker gets a few items, none of which is less than two strips.
  const int64_t most = std::max<int64_t>(1, pixels / 16);
  const int64_t parts = std::clamp<int64_t>((4 * (helpers + 1) + groups - 1) / groups, 1, helpers > 0 ? most : 1);
  const auto work = [&](int64_t item, Worker&) {
    const int64_t part = item / groups;
    leader.job->kernels.points(layer.step, from, to, leader.from.data(), leader.to.data(), leader.residual.data(),
                               item % groups, pixels * part / parts, pixels * (part + 1) / parts);
  };
  leader.team->share(groups * parts, work, leader);
}

void run_rows(const Layer& layer) {
  const Map &from = layer.source(), &to = layer.target();
  const Kernels& kernels = layer.worker.job->kernels;
  const auto [rows, width] = rows_of(kernels, layer.step, from, to);
  const int64_t groups = to.blocks * kBlock / width, helpers = layer.worker.team->helpers();
  // Weights of one group of channels meet all samples before those of the next.
  if (helpers == 0) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < layer.samples; ++i) {
        rows(layer.step, from, to, layer.in(i), layer.out(i), layer.residual(i), g, 0, to.height,
             layer.worker.frequencies);
      }
    }
    return;
  }
  const int64_t whole = groups * layer.samples;
  // Tiles of two rows stay whole.
  const int64_t unit = layer.step.winograd == 2 ? 2 : 1, units = (to.height + unit - 1) / unit;
  const int64_t parts = std::min(units, (4 * (helpers + 1) + whole - 1) / whole);
  const auto work = [&, rows = rows](int64_t item, Worker& worker) {
    const int64_t part = item / groups % parts, i = item / groups / parts;
    rows(layer.step, from, to, layer.in(i), layer.out(i), layer.residual(i), item % groups,
         unit * (units * part / parts), std::min(to.height, unit * (units * (part + 1) / parts)), worker.frequencies);
  };
  layer.worker.team->share(whole * parts, work, layer.worker);
}

// A Winograd convolution goes through its tiles in chunks of a few tile rows of all samples.
struct Winograd {
  const Layer& layer;
  const Map &from, &to;
  const Kernels& kernels;
  // Columns and rows of a tile's outputs, rows of its inputs above them.
  int64_t m, tall, above;
  int64_t frequencies, tile_rows, tile_columns, parts, rows_a_chunk, rows, chunks;
  bool lines;           // whether tiles are one row high, and the kernel for that is there
  int64_t tile_floats;  // from one tile to the next in a block of transformed pixels

  explicit Winograd(const Layer& l)
      : layer(l), from(l.source()), to(l.target()), kernels(l.worker.job->kernels), m(l.step.winograd) {
    tall = l.step.rows == 1 ? 1 : m;
    above = l.step.above;
    frequencies = frequencies_of(l.step);
    lines = l.step.rows == 1 && kernels.winograd_line != nullptr;
    tile_floats = lines ? frequencies * kBlock : kBlock;
    tile_rows = (to.height + tall - 1) / tall;
    tile_columns = (to.width + m - 1) / m;
    const int64_t most = chunk_tiles(l.step, from);
    parts = (tile_columns + most - 1) / most;
    rows = layer.samples * tile_rows * parts;
    rows_a_chunk = std::max<int64_t>(1, most / tile_columns);
    // Every worker gets a chunk.
    if (!heavy()) rows_a_chunk = std::clamp(rows / (l.worker.team->helpers() + 1), int64_t{1}, rows_a_chunk);
    chunks = (rows + rows_a_chunk - 1) / rows_a_chunk;
  }

  bool heavy() const {
    return frequencies * from.channels * to.blocks * kBlock * int64_t{sizeof(float)} > kCacheableWeights;
  }

  // Row `r` of all samples' tile rows, each cut into `parts`.
  TileRow row(int64_t r) const {
    const int64_t part = r % parts, ty = r / parts % tile_rows, i = r / parts / tile_rows;
    const int64_t begin = tile_columns * part / parts, end = tile_columns * (part + 1) / parts;
    const int64_t y = ty * tall, place = to.at(y, begin * m);
    const float* const residual = reinterpret_cast<const float*>(layer.residual(i));
    return {reinterpret_cast<const float*>(layer.in(i)) + from.at(y - above, begin * m - 1),
            reinterpret_cast<float*>(layer.out(i)) + place,
            residual == nullptr ? nullptr : residual + place,
            end - begin,
            std::min(tall, to.height - y),
            to.width - begin * m};
  }

  struct Chunk {
    int64_t begin, end, tiles, pitch;
    float *frequencies, *product;
  };
  Chunk chunk(int64_t c, Worker& worker) const {
    const int64_t begin = rows * c / chunks, end = rows * (c + 1) / chunks;
    int64_t tiles = 0;
    for (int64_t r = begin; r < end; ++r) tiles += row(r).tiles;
    const bool in_place = from.blocks == to.blocks && to.blocks * kBlock <= kernels.winograd_in_place &&
                          to.blocks * kBlock == winograd_width(to.blocks);
    // One line more than the tiles need: streams a power of two apart would share a cache set.
    const int64_t pitch = std::max(from.blocks, to.blocks) * tiles * kBlock + kBlock;
    return {begin, end, tiles, pitch, worker.frequencies, in_place ? worker.frequencies : worker.product};
  }
  void input(const Chunk& chunk, int64_t block) const {
    float* v = chunk.frequencies + block * chunk.tiles * tile_floats;
    for (int64_t r = chunk.begin; r < chunk.end; ++r) {
      const TileRow tiles = row(r);
      kernels.winograd_input(layer.step, from, tiles, block, v, chunk.pitch);
      v += tiles.tiles * tile_floats;
    }
  }
  void multiply(const Chunk& chunk, int64_t frequency) const {
    const int64_t place = frequency * chunk.pitch;
    kernels.winograd_multiply(layer.step, from, to, frequency, chunk.tiles, chunk.frequencies + place,
                              chunk.product + place, chunk.tiles * kBlock);
  }
  void output(const Chunk& chunk, int64_t block) const {
    const float* v = chunk.product + block * chunk.tiles * kBlock;
    for (int64_t r = chunk.begin; r < chunk.end; ++r) {
      const TileRow tiles = row(r);
      kernels.winograd_output(layer.step, to, tiles, block, v, chunk.pitch);
      v += tiles.tiles * kBlock;
    }
  }
  void line(const Chunk& chunk, int64_t block) const {
    const float* v = chunk.frequencies;
    for (int64_t r = chunk.begin; r < chunk.end; ++r) {
      const TileRow tiles = row(r);
      kernels.winograd_line(layer.step, from, to, tiles, block, v, chunk.tiles * tile_floats);
      v += tiles.tiles * tile_floats;
    }
  }
  void run(int64_t c, Worker& worker) const {
    const Chunk part = chunk(c, worker);
    for (int64_t b = 0; b < from.blocks; ++b) input(part, b);
    if (lines) {
      for (int64_t b = 0; b < to.blocks; ++b) line(part, b);
      return;
    }
    for (int64_t f = 0; f < frequencies; ++f) multiply(part, f);
    for (int64_t b = 0; b < to.blocks; ++b) output(part, b);
  }
};

void run_winograd(const Layer& layer) {
  const Winograd winograd(layer);
  Worker& leader = layer.worker;
  const int64_t helpers = leader.team->helpers();
  if (helpers == 0) {
    for (int64_t c = 0; c < winograd.chunks; ++c) winograd.run(c, leader);
  } else if (winograd.chunks > (winograd.heavy() ? 4 * (helpers + 1) : 1)) {
    const auto work = [&](int64_t c, Worker& worker) { winograd.run(c, worker); };
    leader.team->share(winograd.chunks, work, leader);
  } else {
    // The weights are the traffic: divided by frequency, or output block, each worker reads only its part of them.
    const int64_t shares = winograd.m + 2, each = winograd.frequencies / shares;
    for (int64_t c = 0; c < winograd.chunks; ++c) {
      const auto chunk = winograd.chunk(c, leader);
      const auto input = [&](int64_t b, Worker&) { winograd.input(chunk, b); };
      const auto multiply = [&](int64_t share, Worker&) {
        for (int64_t f = share * each; f < (share + 1) * each; ++f) winograd.multiply(chunk, f);
      };
      const auto output = [&](int64_t b, Worker&) { winograd.output(chunk, b); };
      leader.team->share(winograd.from.blocks, input, leader);
      if (winograd.lines) {
        leader.team->share(winograd.to.blocks, [&](int64_t b, Worker&) { winograd.line(chunk, b); }, leader);
        continue;
      }
      leader.team->share(shares, multiply, leader);
      leader.team->share(winograd.to.blocks, output, leader);
    }
  }
}

// Steps that compute every channel from one of the same number.
void run_blocks(const Layer& layer, decltype(Kernels::affine) kernel) {
  const Map &from = layer.source(), &to = layer.target();
  const Map& other = layer.step.residual < 0 ? to : layer.network().maps[layer.step.residual];
  const int64_t blocks = layer.step.kind == Kind::affine ? to.blocks : from.blocks;
  const auto work = [&](int64_t item, Worker&) {
    const int64_t i = item / blocks, block = item % blocks;
    kernel(layer.step, from, to, other, layer.in(i), layer.out(i), layer.residual(i), block, block + 1);
  };
  if (layer.worker.team->helpers() > 0) return layer.worker.team->share(layer.samples * blocks, work, layer.worker);
  for (int64_t i = 0; i < layer.samples; ++i) {
    kernel(layer.step, from, to, other, layer.in(i), layer.out(i), layer.residual(i), 0, blocks);
  }
}

// Between memory and one pixel of a map, up to kBlock numbers: floats become elements and back, which hold them
// exactly.
template <class T>
void copy_numbers(const T* in, T* out, int64_t n) {
  if (n == kBlock) {
    std::memcpy(out, in, kBlock * sizeof(T));  // of a known size: no call
  } else {
    std::memcpy(out, in, n * sizeof(T));
  }
}
void copy_numbers(const float* in, uint16_t* out, int64_t n) {
  uint32_t bits;
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(&bits, in + i, sizeof(bits));
    out[i] = static_cast<uint16_t>(bits >> 16);
  }
}
void copy_numbers(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

// Features of a batch → the first channels of a map. Memory: what a number is outside of maps.
template <class Memory, class Element>
void load_features(const Layer& layer) {
  const Batch& batch = layer.worker.job->batch;
  const Map& map = layer.target();
  const int64_t channels = layer.source().channels, channel_stride = batch.strides[1];
  Memory pixel[kBlock];
  for (int64_t i = 0; i < layer.samples; ++i) {
    const auto* const sample = static_cast<const Memory*>(batch.images) + layer.to[i]->sample * batch.strides[0];
    auto* const out = reinterpret_cast<Element*>(layer.out(i));
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x) {
        const Memory* in = sample + y * batch.strides[2] + x * batch.strides[3];
        Element* z = out + map.at(y, x);
        for (int64_t c = 0; c < channels; c += kBlock, in += kBlock * channel_stride, z += map.block_pitch) {
          const int64_t n = std::min(kBlock, channels - c);
          const Memory* values = in;
          if (channel_stride != 1) {
            for (int64_t k = 0; k < n; ++k) pixel[k] = in[k * channel_stride];
            values = pixel;
          }
          copy_numbers(values, z, n);
          std::fill(z + n, z + kBlock, Element{0});  // kernels may read these lanes, with weights of zero
        }
      }
    }
  }
}

#ifdef EEFAST_X86
constexpr bool kCanPassCaches = true;
// To memory at a multiple of 16 bytes.
void copy_past_caches(const float* in, float* out) {
  for (int64_t i = 0; i < kBlock; i += 4) _mm_stream_ps(out + i, _mm_loadu_ps(in + i));
}
void wait_for_memory() { _mm_sfence(); }
#else
constexpr bool kCanPassCaches = false;
void copy_past_caches(const float*, float*) {}
void wait_for_memory() {}
#endif

// Features that a cache would lose before they are loaded again; through it every line would be read first.
constexpr int64_t kPassingBytes = 1 << 20;

bool pass_caches(const Batch& batch, const Map& map) {
  const int64_t numbers = batch.samples * map.height * map.width * batch.stored_channels;
  const bool aligned = reinterpret_cast<std::uintptr_t>(batch.features) % 16 == 0 && batch.stored_channels % 4 == 0;
  return kCanPassCaches && aligned && numbers * int64_t{sizeof(float)} > kPassingBytes;
}

// The first channels of a map → features of a batch.
template <class Memory, class Element>
void store_features(const Layer& layer) {
  const Batch& batch = layer.worker.job->batch;
  const Map& map = layer.source();
  const int64_t channels = batch.stored_channels;
  const bool passes = pass_caches(batch, map);
  int64_t row = layer.worker.job->stored.fetch_add(layer.samples, std::memory_order_relaxed);
  for (int64_t i = 0; i < layer.samples; ++i, ++row) {
    batch.exits[layer.from[i]->sample] = layer.network().num_exits + row;
    auto* out = static_cast<Memory*>(batch.features) + row * map.height * map.width * channels;
    const auto* const in = reinterpret_cast<const Element*>(layer.in(i));
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x, out += channels) {
        const Element* z = in + map.at(y, x);
        for (int64_t c = 0; c < channels; c += kBlock, z += map.block_pitch) {
          if constexpr (std::is_same_v<Element, float>) {
            if (passes && channels - c >= kBlock) {
              copy_past_caches(z, out + c);
              continue;
            }
          }
          copy_numbers(z, out + c, std::min(kBlock, channels - c));
        }
      }
    }
  }
  if (passes) wait_for_memory();
}

void run_transfer(const Layer& layer) {
  const bool load = layer.step.kind == Kind::load;
  switch (layer.network().precision) {
    case Precision::float32: return (load ? load_features<float, float> : store_features<float, float>)(layer);
    case Precision::bfloat16: return (load ? load_features<float, uint16_t> : store_features<float, uint16_t>)(layer);
    case Precision::int8: return (load ? load_features<uint8_t, uint8_t> : store_features<uint8_t, uint8_t>)(layer);
  }
}

void run_layer(const Layer& layer) {
  const Kernels& kernels = layer.worker.job->kernels;
  const Step& step = layer.step;
  if (step.kind == Kind::load || step.kind == Kind::store) return run_transfer(layer);
  if (step.kind == Kind::convolution) {
    if (is_vector(layer)) return run_vectors(layer);
    if (is_points(layer)) return run_points(layer);
    return step.winograd == 0 || kernels.winograd_input == nullptr ? run_rows(layer) : run_winograd(layer);
  }
  run_blocks(layer, step.kind == Kind::affine  ? kernels.affine
                    : step.kind == Kind::mean  ? kernels.mean
                    : step.kind == Kind::scale ? kernels.scale
                    : step.kind == Kind::join  ? kernels.join
                                               : kernels.max_pool);
}

// Of one image; null where it exits here whatever its confidence. shared: of all images at this exit, null at the last.
const float* threshold_of(const Slot& slot, const float* shared, const Job& job) {
  if (shared == nullptr || !job.batch.thresholds_of_each) return shared;
  const float* const threshold = shared + slot.sample * job.network.num_exits;
  return std::isnan(*threshold) ? nullptr : threshold;
}

// Whether a sample exits, and its confidence. With a rule the logits become the answer so far, which is written.
bool exits_at(const Step& step, const Job& job, const float* threshold, float* logits, int64_t sample,
              float* confidence) {
  const Batch& batch = job.batch;
  if (batch.rule == nullptr) return job.kernels.exit(job.network, threshold, logits, confidence);
  const int64_t classes = job.network.num_classes;
  float *const row = batch.logits + sample * classes, *const value = batch.confidence + sample;
  *confidence = job.kernels.carry(batch.rule + step.target * kRuleNumbers, classes, logits, row, 1, value);
  std::memcpy(row, logits, classes * sizeof(float));
  *value = *confidence;
  return threshold == nullptr || *confidence > *threshold;
}

// Writes the answers of the samples that exit here and takes them out of `live`.
void run_exit(const Step& step, std::vector<Slot*>& live, Worker& worker) {
  const Job& job = *worker.job;
  const Network& net = job.network;
  const Kernels& kernels = job.kernels;
  const Map& map = net.maps[step.source];
  const float* const threshold = step.target == net.num_exits ? nullptr : job.batch.thresholds + step.target;
  // What is stored after this exit has the answer so far.
  const bool answers_all = job.batch.every_answer || (net.stored >= 0 && step.target + 1 == net.num_exits);
  const int64_t size = map.blocks * kBlock * (step.flatten ? map.height * map.width : 1);
  const int64_t blocks = (net.num_classes + kBlock) / kBlock, samples = static_cast<int64_t>(live.size());
  int64_t kept = 0;
  for (int64_t first = 0; first < samples; first += kExitSamples) {
    const int64_t n = std::min(kExitSamples, samples - first);
    for (int64_t i = 0; i < n; ++i) {
      kernels.exit_values(step, map, map_of(worker, live[first + i], step.source),
                          worker.values + i * job.value_floats);
    }
    const auto work = [&](int64_t block, Worker&) {
      kernels.exit_logits(step, size, n, worker.values, job.value_floats, worker.logits, job.logit_floats, block,
                          block + 1);
    };
    worker.team->share(blocks, work, worker);
    for (int64_t i = 0; i < n; ++i) {
      float confidence, *const logits = worker.logits + i * job.logit_floats;
      Slot* const slot = live[first + i];
      const float* const limit = threshold_of(*slot, threshold, job);
      const bool exits = exits_at(step, job, limit, logits, slot->sample, &confidence);
      if (!exits) live[kept++] = slot;
      if (!exits && !answers_all) continue;
      std::memcpy(job.batch.logits + slot->sample * net.num_classes, logits, net.num_classes * sizeof(float));
      job.batch.confidence[slot->sample] = confidence;
      if (exits) job.batch.exits[slot->sample] = step.target;
    }
  }
  live.resize(kept);
}

// Of this thread: what other processes do to the clock must not decide how a network is planned.
double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// What a NaN in an image makes of all that follows; no confidence that is NaN lets a sample exit early, and no code
// that is stored stands for it: then its exit is -1.
void answer_nan(const Job& job, int64_t sample) {
  const int64_t classes = job.network.num_classes;
  std::fill_n(job.batch.logits + sample * classes, classes, std::numeric_limits<float>::quiet_NaN());
  job.batch.confidence[sample] = std::numeric_limits<float>::quiet_NaN();
  job.batch.exits[sample] = job.network.stored < 0 ? job.network.num_exits : -1;
}

void run_section(Worker& worker, int64_t s);

// Brings a sample into section `s`, which runs when its slots are full.
void enter(Worker& worker, int64_t s, Slot* from, int64_t sample) {
  const Section& section = worker.job->network.sections[s];
  const double begin = worker.job->batch.seconds ? now() : 0;
  Slot* to = &worker.slots[s][worker.used[s]++];
  to->sample = sample;
  for (const Step& step : section.entry) run_layer({step, &from, &to, 1, worker});
  if (worker.job->batch.seconds) worker.job->batch.seconds[s] += now() - begin;
  if (worker.used[s] == section.group) run_section(worker, s);
}

// Runs the samples that wait in section `s` to its end; those that survive enter the next one.
void run_section(Worker& worker, int64_t s) {
  const Section& section = worker.job->network.sections[s];
  const double begin = worker.job->batch.seconds ? now() : 0;
  std::vector<Slot*>& live = worker.live[s];
  live.clear();
  for (int64_t i = 0; i < worker.used[s]; ++i) live.push_back(&worker.slots[s][i]);
  worker.used[s] = 0;
  for (const Step& step : section.body) {
    if (live.empty()) break;
    if (step.kind == Kind::exit) {
      run_exit(step, live, worker);
    } else {
      run_layer({step, live.data(), live.data(), static_cast<int64_t>(live.size()), worker});
      if (step.kind == Kind::store) live.clear();
    }
  }
  if (worker.job->batch.seconds) worker.job->batch.seconds[s] += now() - begin;
  for (Slot* slot : live) enter(worker, s + 1, slot, slot->sample);
}

// The busy worker that has fewest helpers; null where all are done.
Team* busiest(std::vector<Team>& teams) {
  Team* found = nullptr;
  for (Team& team : teams) {
    if (team.is_open() && (found == nullptr || team.helpers() < found->helpers())) found = &team;
  }
  return found;
}

void work(int64_t index, void* context) {
  Job& job = *static_cast<Job*>(context);
  Team& team = job.teams[index];
  Worker worker = make_worker(job, team);
  const auto sections = static_cast<int64_t>(job.network.sections.size());
  team.open();
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.batch.samples;) {
    if (job.network.loads || load_image(worker, i)) {
      enter(worker, 0, nullptr, i);
    } else {
      answer_nan(job, i);
    }
  }
  for (int64_t s = 0; s < sections; ++s) {
    if (worker.used[s] > 0) run_section(worker, s);
  }
  team.close();
  while (Team* other = busiest(job.teams)) other->help(&worker);
}

}  // namespace

void resident_forward(const Network& network, const Batch& batch, int64_t threads, Parallel parallel) {
  Job job(network, batch, threads);
  if (batch.features != nullptr && network.stored >= 0) {
    const Map& map = network.maps[network.stored];
    const int64_t number = job.int8() ? 1 : sizeof(float);
    advise_large_pages(batch.features, batch.samples * map.height * map.width * batch.stored_channels * number);
  }
  if (threads == 1) {
    work(0, &job);
  } else {
    parallel(threads, work, &job);
  }
}

struct Carrier::Parts {
  Batch batch;
  Job job;
  Places places;
  Arena arena;
  Worker worker;

  Parts(const Network& network, const Batch& of, int64_t slots)
      : batch(of),
        job(network, batch, 1),
        places(job, [&](const Section&) { return slots; }),
        arena(places.layout, places.size),
        worker(make_worker(job, job.teams[0], places, arena.memory, true)) {}
};

Carrier::Carrier(const Network& network, const Batch& batch, int64_t slots)
    : parts_(std::make_unique<Parts>(network, batch, slots)) {}

Carrier::~Carrier() = default;

std::vector<Slot>& Carrier::slots(int64_t section) { return parts_->worker.slots[section]; }

bool Carrier::load(const void* image, bool bytes, const std::array<int64_t, 3>& strides, Slot* to) {
  Batch& batch = parts_->batch;
  batch.images = image;
  batch.bytes = bytes;
  std::copy(strides.begin(), strides.end(), batch.strides + 1);
  batch.strides[0] = 0;
  if (!load_image(parts_->worker, to->sample)) {
    answer_nan(parts_->job, to->sample);
    return false;
  }
  Slot* const none = nullptr;
  for (const Step& step : parts_->job.network.sections[0].entry) run_layer({step, &none, &to, 1, parts_->worker});
  return true;
}

void Carrier::enter(int64_t section, Slot* from, Slot* to) {
  const std::vector<Step>& entry = parts_->job.network.sections[section].entry;
  for (const Step& step : entry) run_layer({step, &from, &to, 1, parts_->worker});
}

void Carrier::run(const Step& step, std::vector<Slot*>& live) {
  if (step.kind == Kind::exit) return run_exit(step, live, parts_->worker);
  run_layer({step, live.data(), live.data(), static_cast<int64_t>(live.size()), parts_->worker});
}

}  // namespace eefast::cpu
