// Small networks with random weights, as the engines under ThreadSanitizer run them.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "program.h"

namespace eefast {

inline std::vector<float> noise(int64_t n, unsigned seed, float scale) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<float> values(n);
  for (float& value : values) value = uniform(generator);
  return values;
}

// Two sections: convolutions, a residual, an exit; a strided convolution, a pooling, the final exit.
struct Made {
  Network network;
  std::vector<float> packed;
  bool carries;

  Made(Precision precision, int64_t channels, int64_t group, int64_t winograd, int64_t height, int64_t width,
       bool carrying = false)
      : carries(carrying) {
    network = {precision, 7, Criterion::max_probability, {}, {}};
    for (const auto& [channels_of, section] : {std::pair<int64_t, int64_t>{3, -1},
                                               {channels, 0},
                                               {channels, 0},
                                               {channels + 4, 1},
                                               {channels + 4, 1},
                                               {channels + 4, 1}}) {
      Map map{};
      map.channels = channels_of;
      map.section = section;
      network.maps.push_back(map);
    }
    const auto step = [](Kind kind, int64_t source, int64_t target, int64_t residual, int64_t stride, int64_t tiles) {
      Step found{};
      found.kind = kind;
      found.source = source;
      found.target = target;
      found.residual = residual;
      found.relu = true;
      found.kernel = found.rows = 3;
      found.stride = stride;
      found.padding = found.above = 1;
      found.winograd = tiles;
      return found;
    };
    network.sections = {{group, 0, {step(Kind::convolution, 0, 1, -1, 1, 0)}, {}},
                        {group, 0, {step(Kind::convolution, 2, 3, -1, 2, 0)}, {}}};
    network.sections[0].body = {step(Kind::convolution, 1, 2, 1, 1, winograd), step(Kind::exit, 2, 0, -1, 1, 0)};
    network.sections[1].body = {step(Kind::convolution, 3, 4, 3, 1, winograd), step(Kind::max_pool, 4, 5, -1, 1, 0),
                                step(Kind::exit, 5, 1, -1, 1, 0)};
    network.num_exits = 1;
    if (const char* const problem = lay_out(network, height, width)) throw std::runtime_error(problem);
    packed = noise(1 << 20, 1, 0.1f);
    std::size_t place = 0;
    for (Section& section : network.sections) {
      for (std::vector<Step>* steps : {&section.entry, &section.body}) {
        for (Step& step : *steps) {
          if (step.kind == Kind::max_pool) continue;
          const int64_t outputs = step.kind == Kind::exit ? kBlock : network.maps[step.target].blocks * kBlock;
          step.flatten = false;
          step.bias = packed.data() + place;
          step.weight = step.bias + outputs;
          const std::size_t begin =
              std::exchange(place, place + outputs + packed_size(step, network.maps, network.num_classes, precision));
          if (precision != Precision::int8) continue;
          if (step.kind == Kind::convolution) fill(step, outputs);
          // Logits of codes are no hundreds.
          if (step.kind == Kind::exit) std::for_each(&packed[begin], &packed[place], [](float& w) { w /= 64; });
        }
      }
    }
    if (place > packed.size()) throw std::runtime_error("too few weights");
  }

  // Numbers with which codes are neither all 0 nor all 255; weights stay what the bytes of floats are.
  void fill(const Step& step, int64_t outputs) {
    float* const numbers = packed.data() + (step.bias - packed.data());
    const int64_t starts = int8_starts(step) * outputs;
    const int32_t start = 20000;
    for (int64_t i = 0; i < starts; ++i) std::memcpy(numbers + i, &start, sizeof(start));
    std::fill_n(numbers + starts, outputs, 1e-3f);
    numbers[starts + outputs] = 0.5f;
  }
};

// Of two exits: the second one adds the first one's logits and, where the class is the same, its confidence.
inline const float kRule[] = {0, 1, 0, 0, 0, 0, 0, 0, 0, 0.5f, 0, 0, 0, 0.25f, 1, 0, 0.5f, 0.75f};

}  // namespace eefast
