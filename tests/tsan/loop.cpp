// The loop of images that come one by one under ThreadSanitizer: clients that put, cancel and close while others take.
#include <atomic>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/resident.h"
#include "cpu/resident_loop.h"
#include "networks.h"

using namespace eefast;
using namespace eefast::cpu;

namespace {

constexpr int64_t kImages = 40;
constexpr double kNever = std::numeric_limits<double>::infinity();
const std::vector<float> kScaling = {60, 50, 40, 128, 100, 90};

struct Answers {
  std::vector<float> logits, confidence;
  std::vector<int64_t> exits;
};

Answers run(const Made& made, const std::vector<float>& images, float threshold) {
  const Map& map = made.network.maps[0];
  const int64_t plane = map.height * map.width;
  Answers found{std::vector<float>(kImages * 7), std::vector<float>(kImages), std::vector<int64_t>(kImages)};
  const Batch batch{images.data(),
                    false,
                    kScaling.data(),
                    kImages,
                    {3 * plane, plane, map.width, 1},
                    &threshold,
                    false,
                    made.carries ? kRule : nullptr,
                    found.logits.data(),
                    found.confidence.data(),
                    found.exits.data(),
                    nullptr};
  resident_forward(made.network, batch, 1, nullptr);
  return found;
}

// An image in every so many has a deadline that is over, or has moments left; others are cancelled.
constexpr int64_t kLate = 5, kUrgent = 7, kCancelled = 11;

// Images of three clients through a loop with three threads. How many answers are wrong, or missing.
int64_t wrong(const Made& made, const std::vector<float>& images, float threshold, const Answers& wanted, bool drop) {
  const Map& map = made.network.maps[0];
  const int64_t size = 3 * map.height * map.width, each = 2 * kImages, clients = 3;
  std::vector<int64_t> counts(3);
  std::vector<float> rule;
  if (made.carries) rule.assign(kRule, kRule + 2 * kRuleNumbers);
  ResidentLoop loop(made.network, kScaling, rule, 3, counts.data());
  const auto limits = std::shared_ptr<const float[]>(new float[1]{threshold});
  std::mutex order;  // of tickets
  int64_t next = 0;
  std::vector<std::thread> threads;
  for (int64_t c = 0; c < clients; ++c) {
    threads.emplace_back([&] {
      for (int64_t i = 0; i < each; ++i) {
        const std::lock_guard<std::mutex> lock(order);
        const int64_t ticket = next++, image = ticket % kImages;
        std::shared_ptr<char[]> memory(new char[size * sizeof(float)]);
        std::memcpy(memory.get(), images.data() + image * size, size * sizeof(float));
        const void* const pixels = memory.get();
        const double now = steady_seconds();
        const double deadline = ticket % kLate == 0 ? now - 1 : ticket % kUrgent == 0 ? now + 1e-3 : kNever;
        loop.put({{ticket, std::move(memory), pixels, false, limits, now, deadline}});
        if (ticket % kCancelled == 0) loop.cancel(ticket / 2);
      }
    });
  }
  std::map<int64_t, int64_t> exits;
  int64_t failed = 0;
  std::thread taker([&] {
    for (;;) {
      const auto answers = loop.take(1e-5);
      if (answers.empty()) return;
      for (const Answered& found : answers) {
        const int64_t image = found.ticket % kImages;
        failed += !exits.emplace(found.ticket, found.exit).second;
        const bool hurried = found.ticket % kLate == 0 || found.ticket % kUrgent == 0;
        if (found.exit < 0 || (hurried && found.exit < wanted.exits[image])) continue;
        failed += found.exit != wanted.exits[image] || found.confidence != wanted.confidence[image];
        failed += !std::equal(found.logits.begin(), found.logits.end(), wanted.logits.begin() + image * 7);
      }
    }
  });
  for (std::thread& thread : threads) thread.join();
  loop.close(drop);
  taker.join();
  for (const auto& [ticket, exit] : exits) failed += exit < 0 && !drop && ticket * 2 > next;
  return failed + clients * each - static_cast<int64_t>(exits.size()) + counts[0] + counts[1] + counts[2];
}

}  // namespace

int main() {
  constexpr Precision float32 = Precision::float32, int8 = Precision::int8;
  const Made thin(float32, 20, 2, 2, 13, 11), alone(float32, 20, 1, 0, 13, 11),
      carrying(float32, 20, 3, 2, 13, 11, true);
  const Made codes(int8, 20, 3, 1, 13, 11);
  const auto images = noise(kImages * 3 * 13 * 11, 2, 1.0f);
  int64_t failed = 0;
  for (const Made* made : {&thin, &alone, &carrying, &codes}) {
    auto found = run(*made, images, 0.0f).confidence;
    std::sort(found.begin(), found.end());
    const float threshold = found[kImages / 2];
    const Answers wanted = run(*made, images, threshold);
    for (const bool drop : {false, true}) failed += wrong(*made, images, threshold, wanted, drop);
  }
  if (failed != 0) return std::printf("%ld answers are wrong or missing\n", static_cast<long>(failed)), 1;
  return std::puts("every image that was put is answered once, with the bits of the engine"), 0;
}
