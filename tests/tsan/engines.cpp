// The C++ engines under ThreadSanitizer, without torch: several callers at once, each with several threads.
#include <algorithm>
#include <cstdio>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/exit_head.h"
#include "cpu/resident.h"
#include "networks.h"

using namespace eefast;
using namespace eefast::cpu;

namespace {

// As torch does it: the caller takes a share, the others go to threads.
void parallel(int64_t n, void (*work)(int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < n; ++i) others.emplace_back(work, i, context);
  work(0, context);
  for (std::thread& other : others) other.join();
}

struct Answers {
  std::vector<float> logits, confidence;
  std::vector<int64_t> exits;
  explicit Answers(int64_t n) : logits(n * 7, -7), confidence(n, -7), exits(n, -7) {}
  bool operator==(const Answers& other) const {
    return logits == other.logits && confidence == other.confidence && exits == other.exits;
  }
};

Answers run(const Made& made, const std::vector<float>& images, int64_t samples, float threshold, int64_t threads) {
  const Map& map = made.network.maps[0];
  const int64_t plane = map.height * map.width;
  Answers found(samples);
  const float scaling[] = {60, 50, 40, 128, 100, 90};
  const Batch batch{images.data(),
                    false,
                    scaling,
                    samples,
                    {3 * plane, plane, map.width, 1},
                    &threshold,
                    false,
                    made.carries ? kRule : nullptr,
                    found.logits.data(),
                    found.confidence.data(),
                    found.exits.data(),
                    nullptr};
  resident_forward(made.network, batch, threads, parallel);
  return found;
}

Answers run_head(const std::vector<float>& features, const std::vector<float>& weight, int64_t samples, float threshold,
                 const float* rule, int64_t threads) {
  Answers found(samples);
  std::vector<int32_t> rows(samples);
  for (int64_t i = 0; i < samples; ++i) rows[i] = static_cast<int32_t>(i);
  std::vector<uint8_t> survives(samples);
  ExitHead head{};
  head.features = features.data();
  head.dtype = DType::float32;
  head.channels = 19, head.height = 1, head.width = 35;
  head.sample_stride = 19 * 35, head.channel_stride = 35, head.row_stride = 35, head.pixel_stride = 1;
  head.weight = weight.data(), head.bias = weight.data() + 8 * 19, head.num_classes = 7;
  head.criterion = Criterion::entropy, head.threshold = &threshold, head.exit_index = 3;
  head.rows = head.positions = rows.data();
  head.logits = found.logits.data(), head.logits_row_stride = 7, head.logits_column_stride = 1;
  head.confidence = found.confidence.data(), head.confidence_stride = 1;
  head.exits = found.exits.data(), head.exits_stride = 1;
  head.survives = survives.data();
  head.rule = rule;
  struct Part {
    const ExitHead& head;
    int64_t samples, threads;
  } part{head, samples, threads};
  parallel(
      threads,
      [](int64_t i, void* context) {
        const Part& part = *static_cast<Part*>(context);
        exit_head(part.head, part.samples * i / part.threads, part.samples * (i + 1) / part.threads);
      },
      &part);
  return found;
}

// Numbers of all answers, one after the other, for a comparison with those of another processor.
bool write(const char* path, const std::vector<Answers>& all) {
  std::FILE* const file = std::fopen(path, "wb");
  if (file == nullptr) return false;
  for (const Answers& found : all) {
    std::fwrite(found.logits.data(), sizeof(float), found.logits.size(), file);
    std::fwrite(found.confidence.data(), sizeof(float), found.confidence.size(), file);
  }
  return std::fclose(file) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  // Narrow and wide, the latter with weights that workers divide; few samples, which they divide as well, and many.
  constexpr Precision float32 = Precision::float32, int8 = Precision::int8;
  const Made thin(float32, 20, 2, 2, 13, 11), wide(float32, 64, 4, 4, 16, 15), direct(float32, 20, 3, 0, 13, 11);
  const Made carrying(float32, 20, 3, 2, 13, 11, true), carrying_codes(int8, 20, 3, 1, 13, 11, true);
  const Made thin_codes(int8, 20, 2, 1, 13, 11), wide_codes(int8, 64, 4, 2, 15, 16),
      direct_codes(int8, 20, 3, 0, 13, 11);
  const auto images = noise(40 * 3 * 16 * 15, 2, 1.0f), features = noise(130 * 19 * 35, 3, 1.0f);
  const auto weight = noise(8 * 19 + 8, 4, 1.0f);
  struct Case {
    const Made* made;
    int64_t samples;
    float threshold;
    Answers wanted;
  };
  std::vector<Case> cases;
  for (const Made* made :
       {&thin, &wide, &direct, &thin_codes, &wide_codes, &direct_codes, &carrying, &carrying_codes}) {
    for (const int64_t samples : {1, 2, argc > 1 ? 5 : 40}) {
      // The middle one of the confidences at the first exit, so that some exit there and the others go on.
      auto found = run(*made, images, samples, 0.0f, 1).confidence;
      std::sort(found.begin(), found.end());
      const float threshold = found[samples / 2];
      cases.push_back({made, samples, threshold, run(*made, images, samples, threshold, 1)});
    }
  }
  const Answers wanted_head = run_head(features, weight, 130, 1.9f, nullptr, 1);
  const Answers carried_head = run_head(features, weight, 130, 0.3f, kRule + kRuleNumbers, 1);
  if (argc > 1) {
    std::vector<Answers> all{wanted_head, carried_head};
    // All samples exit at the first exit, then none does.
    for (const Case& given : cases) {
      for (const float threshold : {-1e9f, 1e9f}) {
        all.push_back(run(*given.made, images, given.samples, threshold, 3));
      }
    }
    return write(argv[1], all) ? 0 : (std::puts("the answers cannot be written"), 1);
  }
  for (const Case& given : cases) {
    const auto& taken = given.wanted.exits;
    if (given.samples == 40 && std::count(taken.begin(), taken.end(), 0) % 40 == 0) {
      return std::puts("all exit at one exit"), 1;
    }
  }
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> callers;
  for (int64_t caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      for (std::size_t round = 0; round < 2 * cases.size(); ++round) {
        const Case& given = cases[(round + 4 * caller) % cases.size()];
        const auto threads = static_cast<int64_t>(1 + (round + caller) % 4);
        if (!(run(*given.made, images, given.samples, given.threshold, threads) == given.wanted)) ++wrong;
        if (!(run_head(features, weight, 130, 1.9f, nullptr, threads) == wanted_head)) ++wrong;
        if (!(run_head(features, weight, 130, 0.3f, kRule + kRuleNumbers, threads) == carried_head)) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  if (wrong != 0) return std::printf("%ld answers differ from those of one thread\n", static_cast<long>(wrong)), 1;
  return std::puts("the same bits from 3 callers with 1 to 4 threads each"), 0;
}
